"""`alveole attach`."""

import sys

import click

from alveole.cli import output
from alveole.cli.console import connect, is_system
from alveole.cli.context import client, leave
from alveole.cli.interactive import exit_codes
from alveole.cli.options import instance_argument


@click.command()
@click.option("--no-stdin", is_flag=True, help="Do not connect your standard input.")
@instance_argument
def command(instance: str, no_stdin: bool) -> None:
    """Connect to the first process of a running instance.

    The exit code is the process's own. Ctrl-C leaves the instance running, unless it has a terminal: then it is
    typed there. Of a whole operating system this is its console: see `alveole console --help`.

    \b
    Example:
      alveole attach web
    """
    with exit_codes():
        leave(_attach(instance, stdin=not no_stdin))


def _attach(instance: str, *, stdin: bool) -> int:
    from alveole.cli import terminal

    def detach(number: int) -> None:
        output.note(f"detached from {instance}: it goes on")
        raise terminal.DetachedError(number)

    record = client().instance(instance)
    if is_system(record):
        return connect(instance, stdin=stdin)
    spec = record["spec"]
    stdin = stdin and spec.get("stdin", False)
    raw = stdin and spec.get("tty", False) and sys.stdin.isatty()
    rows, columns = terminal.size()
    with (
        terminal.Signals() as signals,
        client().attach(instance, rows=rows, columns=columns) as session,
        terminal.raw(raw),
    ):
        try:
            return terminal.join(session, signals, stdin=stdin, on_signal=detach)
        except terminal.DetachedError as detached:
            return detached.exit_code
