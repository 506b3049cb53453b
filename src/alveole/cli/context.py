"""What every command shares: the global options, the client made of them, and the exit codes."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from alveole.client.errors import ApiError

if TYPE_CHECKING:
    from alveole.client.api import Client

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_OWN_FAILURE = 125  # run and exec: the failure is Alveole's, not the command's
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class BadValueError(click.UsageError):
    """A wrong value: which flag, what is wrong with it, what would be right."""

    def __init__(self, flag: str, value: str, why: str, valid: str) -> None:
        super().__init__(f"{flag} {value!r}: {why}; valid: {valid}")


class Globals(NamedTuple):
    socket: str
    project: str
    debug: bool

    def client(self) -> "Client":
        from alveole.client.api import Client

        return Client(self.socket, self.project)


def globals_of(context: click.Context) -> Globals:
    """The root command's options, also while the shell completes and no command is invoked."""
    given = context.find_root().params
    return Globals(given["socket"], given["project"], given["debug"])


def client() -> "Client":
    """The client that the global options of the command being run describe."""
    return globals_of(click.get_current_context()).client()


def leave(code: int) -> None:
    """End the command with this exit code."""
    if code:
        click.get_current_context().exit(code)


def report(error: ApiError) -> None:
    """An error as users read it: what happened and what to do; with --debug, also where it came from."""
    from alveole.cli import output

    output.note(output.style("error: ", "red", sys.stderr) + output.printable(str(error)))
    if globals_of(click.get_current_context()).debug:
        for name, value in (("code", error.code), ("field", error.field), ("cause", repr(error.__cause__ or ""))):
            output.note(f"  {name}: {output.printable(value)}")


def each(names: Sequence[str], act: Callable[[str], Any]) -> None:
    """Do it to all, also after one failed; then exit 1 if one did."""
    failed = False
    for name in dict.fromkeys(names):
        try:
            act(name)
        except ApiError as error:
            report(error)
            failed = True
    leave(EXIT_FAILED if failed else 0)


@contextmanager
def daemon_part() -> Iterator[None]:
    """Around an import that only an installation with the daemon can do."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ApiError(
            "unsupported",
            f"this installation has the command line only: {error.name} is missing",
            "install the daemon's part too: pip install 'alveole[server]'",
        ) from error
