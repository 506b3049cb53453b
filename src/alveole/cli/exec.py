"""`alveole exec`."""

import os
from typing import Any

import click

from alveole.cli.context import client, leave
from alveole.cli.interactive import exit_codes, terminal_options, wants_raw
from alveole.cli.options import complete_instances
from alveole.cli.values import environment


@click.command(context_settings={"allow_interspersed_args": False})
@terminal_options
@click.option(
    "-e", "--env", metavar="KEY[=VALUE]", multiple=True, help="Set a variable; KEY alone passes your own value."
)
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Who runs the command.")
@click.option("-w", "--workdir", metavar="PATH", help="Where the command begins.")
@click.argument("instance", shell_complete=complete_instances)
@click.argument("command_line", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def command(instance: str, command_line: tuple[str, ...], **options: Any) -> None:
    """Run a command in a running instance.

    The exit code is the command's own; 125 if Alveole failed, 126 if the command cannot be invoked, 127 if it does
    not exist. Ctrl-C without a terminal ends the command.

    \b
    Examples:
      alveole exec web ls -l /
      alveole exec -it web sh
      alveole exec -i db psql < dump.sql
    """
    raw = wants_raw(tty=options["tty"], stdin=options["stdin"])
    request: dict[str, Any] = {
        "command": list(command_line),
        "env": environment("--env", options["env"], os.environ),
        "tty": options["tty"],
        "stdin": options["stdin"],
    }
    request |= {name: options[name] for name in ("user", "workdir") if options[name]}
    with exit_codes():
        leave(_run(instance, request, raw=raw))


def _run(instance: str, request: dict[str, Any], *, raw: bool) -> int:
    from alveole.cli import terminal

    def leave_it(number: int) -> None:
        raise terminal.DetachedError(number)  # the daemon kills the command when its session is closed

    rows, columns = terminal.size()
    session = client().exec(instance, {**request, "rows": rows, "columns": columns})
    with terminal.Signals() as signals, session, terminal.raw(raw):
        try:
            return terminal.join(session, signals, stdin=request["stdin"], on_signal=leave_it)
        except terminal.DetachedError as detached:
            return detached.exit_code
