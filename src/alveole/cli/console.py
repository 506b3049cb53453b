"""`alveole console`."""

import sys
from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client, leave
from alveole.cli.interactive import exit_codes
from alveole.cli.options import instance_argument
from alveole.client.errors import ApiError

_SCROLLBACK_LINES = 20


@click.command()
@click.option("--no-stdin", is_flag=True, help="Only look: do not connect your standard input.")
@instance_argument
def command(instance: str, no_stdin: bool) -> None:
    """Sit down at the serial console of an operating system, or at the terminal of any instance that has one.

    First the last lines that were written there are shown. Ctrl-] leaves it as it is, what is logged in included.

    \b
    Example:
      alveole console legacy
    """
    with exit_codes():
        record = client().instance(instance)
        if not is_system(record) and not record["spec"].get("tty", False):
            raise ApiError(
                "unsupported",
                f"instance {instance} has no console: it has no terminal",
                "connect to its output with `alveole attach`, or run a shell in it with `alveole exec -it`",
            )
        leave(connect(instance, stdin=not no_stdin))


def is_system(record: dict[str, Any]) -> bool:
    return bool((record.get("image") or {}).get("disk"))


def connect(instance: str, *, stdin: bool) -> int:
    """Our exit code."""
    from alveole.cli import terminal

    def detach(number: int) -> None:
        raise terminal.DetachedError(number)

    rows, columns = terminal.size()
    is_terminal = stdin and sys.stdin.isatty()
    with terminal.Signals() as signals, client().attach(instance, rows=rows, columns=columns) as session:
        _show_last_lines(instance)  # after we are attached: some may be seen twice, none is missed
        if is_terminal:
            output.note(f"[connected to {instance}; Ctrl-] leaves it]")
        with terminal.raw(is_terminal):
            try:
                return terminal.join(session, signals, stdin=stdin, on_signal=detach, console=True)
            except terminal.DetachedError as detached:
                code = detached.exit_code
        if is_terminal:
            output.note(f"\n[left {instance}: it goes on]")
        return code


def _show_last_lines(instance: str) -> None:
    for record in client().logs(instance, follow=False, tail=_SCROLLBACK_LINES, since=None):
        sys.stdout.write(record["line"] + ("" if record.get("partial", False) else "\n"))
    sys.stdout.flush()
