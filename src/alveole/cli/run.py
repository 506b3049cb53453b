"""`alveole run`: detached it is one request; in the foreground a session carries its output and exit code."""

import signal
import time
from dataclasses import dataclass
from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client, leave
from alveole.cli.interactive import exit_codes, terminal_options, wants_raw
from alveole.cli.progress import ProgressLine, finish
from alveole.cli.specoptions import given_spec, spec_options
from alveole.client.api import Client
from alveole.client.errors import ApiError

_REMOVAL_S = 10.0
_REMOVAL_PAUSE_S = 0.02


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-d", "--detach", is_flag=True, help="Print its id and leave it running.")
@terminal_options
@spec_options
def command(detach: bool, **options: Any) -> None:
    """Create an instance and start it, with its output here unless detached.

    The exit code is the command's own; 125 if Alveole failed, 126 if the command cannot be invoked, 127 if it does
    not exist. The first Ctrl-C goes to the instance, the second leaves it running.

    \b
    Examples:
      alveole run --rm debian:12 echo hello
      alveole run -it --isolation sandbox debian:12 bash
      alveole run -d --name web -p 8080:80 -m 256m --restart always nginx
    """
    raw = not detach and wants_raw(tty=options["tty"], stdin=options["stdin"])
    spec = given_spec(options)
    with exit_codes():
        if detach:
            operation = finish(
                client(), lambda wait_s: client().create_instance(spec, name=options["name"], wait_s=wait_s)
            )
            output.line(operation["result"]["id"])
        else:
            leave(_foreground(client(), spec, options["name"], raw=raw))


@dataclass
class _Run:
    """A run in the foreground, before and after its process has started."""

    client: Client
    operation: dict[str, Any]
    tty: bool
    progress: ProgressLine
    interrupts: int = 0

    def on_signal(self, number: int) -> None:
        """Forward the first signal; leave at the second, and when our terminal goes."""
        from alveole.cli.terminal import DetachedError

        name = _name(self.operation)
        self.interrupts += 1
        self.progress.clear()
        if number == signal.SIGHUP:  # nobody is there to read a message
            raise DetachedError(number)
        if self.interrupts > 1 or self.tty:
            output.note(f"detached: {name} goes on; `alveole attach {name}` returns to it")
            raise DetachedError(number)
        try:
            self.client.kill_instance(name, signal.Signals(number).name)
        except ApiError as error:
            if error.code not in {"conflict", "not_found"}:
                raise
            self.client.cancel_operation(self.operation["id"])  # it has not started yet

    def refresh(self) -> None:
        """Say how far it is, until its process has started."""
        if self.progress.due and self.operation["state"] == "running":
            self.operation = self.client.operation(self.operation["id"])
            if self.operation["state"] == "running":
                self.progress.show(self.operation)
            else:
                self.progress.clear()


def _foreground(api: Client, spec: dict[str, Any], name: str | None, *, raw: bool) -> int:
    """Its exit code."""
    from alveole.cli import terminal

    operation = api.create_instance({**spec, "attach": True}, name=name)
    rows, columns = terminal.size()
    with (
        terminal.Signals() as signals,
        ProgressLine() as progress,
        api.attach(_name(operation), rows=rows, columns=columns) as session,
        terminal.raw(raw),
    ):
        run = _Run(api, operation, spec.get("tty", False), progress)
        try:
            code = terminal.join(
                session,
                signals,
                stdin=spec.get("stdin", False),
                on_signal=run.on_signal,
                idle=run.refresh,
                started=progress.clear,
            )
        except terminal.DetachedError as detached:
            return detached.exit_code
    if spec.get("remove_on_exit"):
        _await_removal(api, operation["result"].get("id") or _name(operation))
    return code


def _name(operation: dict[str, Any]) -> str:
    return str(operation["target"]).partition("/")[2]


def _await_removal(api: Client, ref: str) -> None:
    """So that the volumes and ports it held are free for the user's next command."""
    give_up_at = time.monotonic() + _REMOVAL_S
    while time.monotonic() < give_up_at:
        try:
            api.instance(ref)
        except ApiError as error:
            if error.code == "not_found":
                return
            raise
        time.sleep(_REMOVAL_PAUSE_S)
