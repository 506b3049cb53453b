"""`alveole events`."""

import json
import sys

import click

from alveole.cli import output
from alveole.cli.context import client
from alveole.client.api import Event


@click.command()
@click.option("--from", "token", metavar="TOKEN", help="Begin after this event; from now on if not given.")
@click.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print."
)
def command(token: str | None, form: str) -> None:
    """Follow every change, as it happens, until Ctrl-C.

    With --format json, each line is one event; its token resumes after it with --from.

    \b
    Examples:
      alveole events
      alveole events --format json | jq .name
    """
    for event in client().events(token):
        if form == "json":
            output.line(json.dumps({"token": event.token, **event.data}, ensure_ascii=False))
        else:
            output.line(output.printable(readable(event)))
        sys.stdout.flush()


def readable(event: Event) -> str:
    """What changed, and to what."""
    changed = event.data.get("object") or {}  # nothing is left of what was removed
    state = changed.get("status", {}).get("phase") or changed.get("phase") or changed.get("state") or ""
    return f"{event.token}  {event.kind:<9} {event.data['action']:<8} {event.data['name']}  {state}".rstrip()
