"""Running a command inside a running instance, by a process of the host that stays with it: its *carrier*.

For containers and sandboxes that is the engine's ``exec``, which puts the command into the instance's namespaces and
cgroup, so that the instance's limits and isolation hold for it.
"""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from alveole.host import pidfd
from alveole.host.process import environment, kill_group, run
from alveole.host.pty import ConsoleSocket, Terminal, open_pair
from alveole.model.agent import ExecRequest, Stream
from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.base import Process
from alveole.runtime.streams import PipeStream, TerminalStream

T = TypeVar("T")
_START_TIMEOUT_S = 30.0
_KILL_TIMEOUT_S = 10.0
_WORDS_BYTES = 16 << 10
# A session leader without a controlling terminal that opens one gets it.
_TAKE_TERMINAL = 'terminal=$1; shift; exec "$@" <>"$terminal"'
_POLL_FIRST_S, _POLL_LAST_S = 0.001, 0.02


class NotStarted(Exception):  # noqa: N818  (says what happened; turned into an AlveoleError by the runtime)
    """The command did not start; the last words of what should have done it."""


class Launcher(Protocol):
    """How one command is brought into one instance."""

    @property
    def id(self) -> str:
        """Of the instance."""
        ...

    @property
    def console_socket(self) -> Path | None:
        """Where the carrier sends the terminal it makes for the command; None: it takes the one it is run on."""
        ...

    async def prepare(self, specification: dict[str, Any]) -> None:
        """Hand over the command's process, as the OCI specification has it."""
        ...

    def argv(self, *, tty: bool) -> tuple[str, ...]:
        """Of the carrier."""
        ...

    def has_started(self) -> bool: ...

    async def kill(self) -> None:
        """SIGKILL the command. Nothing happens if it has ended or not begun."""
        ...

    def forget(self) -> None:
        """Remove the files of the command."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLauncher:
    """By ``exec`` of an OCI engine. Its files begin with ``stem``."""

    id: str
    engine: tuple[str, ...]
    pid_option: str
    pid_is_inside: bool
    makes_terminal: bool
    stem: Path

    @property
    def console_socket(self) -> Path | None:
        return self.stem.with_suffix(".tty") if self.makes_terminal else None

    @property
    def _specification(self) -> Path:
        return self.stem.with_suffix(".json")

    @property
    def _pid_file(self) -> Path:
        return self.stem.with_suffix(".pid")

    async def prepare(self, specification: dict[str, Any]) -> None:
        self._specification.write_text(json.dumps(specification))

    def argv(self, *, tty: bool) -> tuple[str, ...]:
        return (
            *(*self.engine, "exec", "--process", str(self._specification), self.pid_option, str(self._pid_file)),
            *(("--console-socket", str(self.console_socket)) if tty and self.console_socket else ()),
            self.id,
        )

    def has_started(self) -> bool:
        """The engine writes the pid file once the command runs, and only then."""
        return self._pid() != 0

    async def kill(self) -> None:
        if not (pid := self._pid()):
            return
        if self.pid_is_inside:
            argv = (*self.engine, "kill", "--pid", str(pid), self.id, "KILL")
            await run(argv, timeout_s=_KILL_TIMEOUT_S, check=False)  # fails if it ends meanwhile
        elif started := pidfd.started_at(pid):
            pidfd.send(pid, started, signal.SIGKILL)

    def forget(self) -> None:
        self._specification.unlink(missing_ok=True)
        self._pid_file.unlink(missing_ok=True)

    def _pid(self) -> int:
        """0 while it is not started."""
        try:
            return int(self._pid_file.read_text() or 0)
        except FileNotFoundError:
            return 0


async def open_session(
    launcher: Launcher, request: ExecRequest, process: Process, specification: dict[str, Any]
) -> Stream:
    """Start a command. Raises NotStarted, or AlveoleError(TIMEOUT). Nothing is left if that or a cancel happens."""
    if process.tty:
        specification["consoleSize"] = {"height": request.rows, "width": request.columns}
    session = _Session(launcher)
    try:
        await launcher.prepare(specification)
        return await (session.on_terminal(request) if process.tty else session.through_pipes(stdin=process.stdin))
    except BaseException:
        launcher.forget()
        raise


class _Session:
    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    async def through_pipes(self, *, stdin: bool) -> Stream:
        pipe = asyncio.subprocess.PIPE
        carrier = await self._spawn(pipe if stdin else asyncio.subprocess.DEVNULL, pipe, pipe)
        await self._or_end(carrier, self._started(carrier))
        return PipeStream(carrier, lambda: self._end(carrier))

    async def on_terminal(self, request: ExecRequest) -> Stream:
        path = self._launcher.console_socket
        carrier, terminal = await (self._terminal_sent(path) if path else self._terminal_of_ours(request))
        terminal.resize(request.rows, request.columns)
        return TerminalStream(carrier, lambda: self._end(carrier), terminal)

    async def _terminal_sent(self, path: Path) -> tuple[asyncio.subprocess.Process, Terminal]:
        """The carrier makes the terminal inside and sends its master."""
        with ConsoleSocket(path) as console:
            null = asyncio.subprocess.DEVNULL
            carrier = await self._spawn(null, null, asyncio.subprocess.PIPE, tty=True)

            async def receive() -> Terminal:
                await self._started(carrier)
                return Terminal(await console.receive())

            return carrier, await self._or_end(carrier, receive())

    async def _terminal_of_ours(self, request: ExecRequest) -> tuple[asyncio.subprocess.Process, Terminal]:
        """The carrier takes the terminal it is run on."""
        terminal, slave = open_pair()
        try:
            terminal.resize(request.rows, request.columns)
            try:
                carrier = await self._spawn(slave, slave, slave, tty=True, terminal=os.ttyname(slave))
            finally:
                os.close(slave)
            await self._or_end(carrier, self._started(carrier, terminal))
        except BaseException:
            terminal.close()
            raise
        return carrier, terminal

    async def _spawn(
        self, stdin: int, stdout: int, stderr: int, *, tty: bool = False, terminal: str = ""
    ) -> asyncio.subprocess.Process:
        """``terminal``: what becomes its controlling terminal, so that keys such as Ctrl-C act as signals."""
        argv = (*(("sh", "-c", _TAKE_TERMINAL, "sh", terminal) if terminal else ()), *self._launcher.argv(tty=tty))
        return await asyncio.create_subprocess_exec(
            *argv, stdin=stdin, stdout=stdout, stderr=stderr, env=environment(), start_new_session=True
        )

    async def _started(self, carrier: asyncio.subprocess.Process, words: Terminal | None = None) -> None:
        """If the command does not start, the reason is the last that the carrier says."""
        ended = asyncio.ensure_future(carrier.wait())
        pause_s = _POLL_FIRST_S
        try:
            while not self._launcher.has_started():
                if ended.done() and not self._launcher.has_started():
                    raise NotStarted((await _last_words(carrier, words)).decode(errors="replace"))
                await asyncio.wait([ended], timeout=pause_s)
                pause_s = min(2 * pause_s, _POLL_LAST_S)
        finally:
            ended.cancel()

    async def _or_end(self, carrier: asyncio.subprocess.Process, starting: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                return await starting
        except TimeoutError as error:
            await self._end(carrier)
            raise AlveoleError(
                ErrorCode.TIMEOUT, f"the command did not start in instance {self._launcher.id}", hint="is it paused?"
            ) from error
        except BaseException:
            await self._end(carrier)
            raise

    async def _end(self, carrier: asyncio.subprocess.Process) -> None:
        """Kill the command if it runs, and the process that waits for it."""
        if carrier.returncode is None:
            await self._launcher.kill()
            kill_group(carrier.pid)
            await carrier.wait()
        self._launcher.forget()


async def _last_words(carrier: asyncio.subprocess.Process, terminal: Terminal | None) -> bytes:
    if terminal:
        return await terminal.read()
    return await carrier.stderr.read(_WORDS_BYTES) if carrier.stderr else b""
