"""`alveole logs`."""

import sys
from datetime import UTC, datetime, timedelta

import click

from alveole.cli.context import BadValueError, client
from alveole.cli.options import instance_argument
from alveole.cli.values import duration_s


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on until the instance has ended.")
@click.option("-n", "--tail", metavar="NUMBER", type=click.IntRange(min=0), help="Only the last lines.")
@click.option("--since", metavar="TIME", help="Only what is newer: 10m, or 2026-01-31T12:00:00Z.")
@click.option("--timestamps", is_flag=True, help="Put the time before each line.")
@instance_argument
def command(instance: str, follow: bool, tail: int | None, since: str | None, timestamps: bool) -> None:
    """Show what an instance wrote: its standard output here on standard output, its errors on standard error.

    \b
    Examples:
      alveole logs --tail 20 web
      alveole logs -f --since 10m --timestamps web
    """
    moment = since_moment(since, datetime.now(UTC)) if since else None
    fresh = True  # the next record begins a line
    for record in client().logs(instance, follow=follow, tail=tail, since=moment):
        stream = sys.stderr if record["stream"] == "stderr" else sys.stdout
        if timestamps and fresh:
            stream.write(record["time"] + " ")
        fresh = not record.get("partial", False)
        stream.write(record["line"] + ("\n" if fresh else ""))
        if follow:
            stream.flush()


def since_moment(text: str, now: datetime) -> str:
    """RFC 3339 from a moment, or from how long ago it was."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None:
        moment = now - timedelta(seconds=duration_s("--since", text))
    elif moment.tzinfo is None:
        raise BadValueError("--since", text, "the time zone is missing", "10m, or 2026-01-31T12:00:00Z")
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
