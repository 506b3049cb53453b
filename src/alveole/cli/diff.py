"""`alveole diff`."""

from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client
from alveole.cli.options import format_option, instance_argument

_Changes = dict[str, Any]


@click.command()
@format_option
@instance_argument
def command(instance: str, form: str) -> None:
    """Show what an instance changed of its image.

    A added, C changed, D deleted. Volumes are no part of it, and no vm, whose disk the host does not look into.

    \b
    Example:
      alveole diff web
    """
    show(client().changes(instance), form)


def show(found: _Changes, form: str) -> None:
    """As ``docker diff`` does, a line each."""
    if form == "table":
        for change in found["changes"]:
            output.line(f"{change['kind']} {output.printable(change['path'])}")
    else:
        output.records(found["changes"], form)
    if not found.get("complete", True):
        output.note(f"there are more: only the first {len(found['changes'])} are shown")


def between(before: _Changes, after: _Changes) -> _Changes:
    """What changed from one to the other, both being told beside the same image."""
    old, new = ({change["path"]: change for change in each["changes"]} for each in (before, after))
    changes = [_change(old.get(path), new.get(path)) for path in sorted(old | new) if old.get(path) != new.get(path)]
    return {"changes": changes, "complete": before.get("complete", True) and after.get("complete", True)}


def _change(old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any]:
    """At one path. Deleted, or not there before and after: that is how what the image has was changed back."""
    was_there = old["kind"] != "D" if old else bool(new and new["kind"] != "A")
    is_there = new["kind"] != "D" if new else bool(old and old["kind"] != "A")
    kind = "C" if was_there and is_there else "A" if is_there else "D"
    found = new or old or {}
    return {**found, "kind": kind}
