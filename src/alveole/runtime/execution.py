"""Running a command inside a running instance, through the engine's ``exec``.

The engine puts it into the instance's namespaces and cgroup, so that the instance's limits and isolation hold for it.
"""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from alveole.host import pidfd
from alveole.host.process import environment, kill_group, run
from alveole.host.pty import ConsoleSocket, Terminal, open_pair
from alveole.model.agent import ExecRequest, Stream
from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.base import Process
from alveole.runtime.conmon import Place
from alveole.runtime.streams import PipeStream, TerminalStream

T = TypeVar("T")
_START_TIMEOUT_S = 30.0
_KILL_TIMEOUT_S = 10.0
_WORDS_BYTES = 16 << 10
# A session leader without a controlling terminal that opens one gets it.
_TAKE_TERMINAL = 'terminal=$1; shift; exec "$@" <>"$terminal"'
_POLL_FIRST_S, _POLL_LAST_S = 0.001, 0.02


class NotStarted(Exception):  # noqa: N818  (says what happened; turned into an AlveoleError by the runtime)
    """The engine did not start the command; its last words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One command. Its files begin with ``stem`` and are removed when it is closed."""

    place: Place
    engine: tuple[str, ...]
    pid_option: str
    pid_is_inside: bool
    console_socket: bool
    stem: Path

    @property
    def _specification(self) -> Path:
        return self.stem.with_suffix(".json")

    @property
    def _pid_file(self) -> Path:
        return self.stem.with_suffix(".pid")

    async def open(self, request: ExecRequest, process: Process, specification: dict[str, Any]) -> Stream:
        """Start it. Raises NotStarted, or AlveoleError(TIMEOUT). Nothing is left if that or a cancel happens."""
        if process.tty:
            specification["consoleSize"] = {"height": request.rows, "width": request.columns}
        self._specification.write_text(json.dumps(specification))
        try:
            return await (self._on_terminal(request) if process.tty else self._through_pipes(stdin=process.stdin))
        except BaseException:
            self._forget()
            raise

    async def _through_pipes(self, *, stdin: bool) -> Stream:
        pipe = asyncio.subprocess.PIPE
        engine = await self._spawn((), pipe if stdin else asyncio.subprocess.DEVNULL, pipe, pipe)
        await self._or_end(engine, self._started(engine))
        return PipeStream(engine, lambda: self._end(engine))

    async def _on_terminal(self, request: ExecRequest) -> Stream:
        opened = self._terminal_of_engine() if self.console_socket else self._terminal_of_ours(request)
        engine, terminal = await opened
        terminal.resize(request.rows, request.columns)
        return TerminalStream(engine, lambda: self._end(engine), terminal)

    async def _terminal_of_engine(self) -> tuple[asyncio.subprocess.Process, Terminal]:
        """The engine makes the terminal inside and sends its master."""
        path = self.stem.with_suffix(".tty")
        with ConsoleSocket(path) as console:
            null = asyncio.subprocess.DEVNULL
            engine = await self._spawn(("--console-socket", str(path)), null, null, asyncio.subprocess.PIPE)

            async def receive() -> Terminal:
                await self._started(engine)
                return Terminal(await console.receive())

            return engine, await self._or_end(engine, receive())

    async def _terminal_of_ours(self, request: ExecRequest) -> tuple[asyncio.subprocess.Process, Terminal]:
        """The engine takes the terminal it is run on."""
        terminal, slave = open_pair()
        try:
            terminal.resize(request.rows, request.columns)
            try:
                engine = await self._spawn((), slave, slave, slave, terminal=os.ttyname(slave))
            finally:
                os.close(slave)
            await self._or_end(engine, self._started(engine, terminal))
        except BaseException:
            terminal.close()
            raise
        return engine, terminal

    async def _spawn(
        self, options: tuple[str, ...], stdin: int, stdout: int, stderr: int, *, terminal: str = ""
    ) -> asyncio.subprocess.Process:
        """``terminal``: what becomes its controlling terminal, so that keys such as Ctrl-C act as signals."""
        argv = (
            *(("sh", "-c", _TAKE_TERMINAL, "sh", terminal) if terminal else ()),
            *(*self.engine, "exec", "--process", str(self._specification), self.pid_option, str(self._pid_file)),
            *(*options, self.place.id),
        )
        return await asyncio.create_subprocess_exec(
            *argv, stdin=stdin, stdout=stdout, stderr=stderr, env=environment(), start_new_session=True
        )

    async def _started(self, engine: asyncio.subprocess.Process, words: Terminal | None = None) -> None:
        """The engine writes the pid file once the command runs, and only then; else its words are in its stderr."""
        ended = asyncio.ensure_future(engine.wait())
        pause_s = _POLL_FIRST_S
        try:
            while not self._pid():
                if ended.done() and not self._pid():
                    raise NotStarted((await _last_words(engine, words)).decode(errors="replace"))
                await asyncio.wait([ended], timeout=pause_s)
                pause_s = min(2 * pause_s, _POLL_LAST_S)
        finally:
            ended.cancel()

    def _pid(self) -> int:
        """0 while it is not started."""
        try:
            return int(self._pid_file.read_text() or 0)
        except FileNotFoundError:
            return 0

    async def _or_end(self, engine: asyncio.subprocess.Process, starting: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                return await starting
        except TimeoutError as error:
            await self._end(engine)
            raise AlveoleError(
                ErrorCode.TIMEOUT, f"the command did not start in instance {self.place.id}", hint="is it paused?"
            ) from error
        except BaseException:
            await self._end(engine)
            raise

    async def _end(self, engine: asyncio.subprocess.Process) -> None:
        """Kill the command if it runs, and the engine's process that waits for it."""
        if engine.returncode is None:
            await self._kill()
            kill_group(engine.pid)
            await engine.wait()
        self._forget()

    async def _kill(self) -> None:
        if not (pid := self._pid()):
            return
        if self.pid_is_inside:
            argv = (*self.engine, "kill", "--pid", str(pid), self.place.id, "KILL")
            await run(argv, timeout_s=_KILL_TIMEOUT_S, check=False)  # fails if it ends meanwhile
        elif started := pidfd.started_at(pid):
            pidfd.send(pid, started, signal.SIGKILL)

    def _forget(self) -> None:
        self._specification.unlink(missing_ok=True)
        self._pid_file.unlink(missing_ok=True)


async def _last_words(engine: asyncio.subprocess.Process, terminal: Terminal | None) -> bytes:
    if terminal:
        return await terminal.read()
    return await engine.stderr.read(_WORDS_BYTES) if engine.stderr else b""
