"""What `run`, `exec` and `attach` share: the flags of a terminal, and the exit codes of a command run elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from alveole.cli.context import EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_OWN_FAILURE, leave, report
from alveole.cli.options import Function
from alveole.client.errors import ApiError


def terminal_options(function: Function) -> Function:
    tty = click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
    stdin = click.option("-i", "--interactive", "stdin", is_flag=True, help="Connect your standard input to it.")
    return stdin(tty(function))


def wants_raw(*, tty: bool, stdin: bool) -> bool:
    """Whether our terminal becomes its terminal. Raises a usage error where we have none to give."""
    if tty and stdin and not sys.stdin.isatty():
        raise click.UsageError("--tty with --interactive: standard input is not a terminal; valid: leave out --tty")
    return tty and stdin


@contextmanager
def exit_codes() -> Iterator[None]:
    """Failures of Alveole end in 125 to 127, so that they are told from the command's own exit code."""
    try:
        yield
    except ApiError as error:
        report(error)
        leave(failure_code(error))


def failure_code(error: ApiError) -> int:
    """What a shell would say: 127, no such command; 126, it cannot be executed; and 125, Alveole failed."""
    if error.code != "invalid":
        return EXIT_OWN_FAILURE
    return {"command": EXIT_NOT_FOUND, "command.mode": EXIT_NOT_EXECUTABLE}.get(error.field, EXIT_OWN_FAILURE)
