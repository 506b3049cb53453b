"""A runtime without processes, for tests of what stands above it. It keeps the same contract as the real ones.

A ``FakeHost`` plays the kernel: it outlives the ``FakeRuntime`` objects opened on it, as instances outlive a daemon.
What a command does is looked up in its ``programs``; time is the host's clock.
"""

import asyncio
import signal as signals
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alveole.model.agent import ExecRequest, Stream
from alveole.model.error import conflict, invalid
from alveole.runtime.base import Capability, Cell, Exit, Handle, Process, Recovered, State

_FIRST_PID = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a command does: print, and end after ``after_s`` seconds (None: never by itself)."""

    code: int = 0
    after_s: float | None = 0.0
    stdout: bytes = b""
    stderr: bytes = b""
    handles: Mapping[int, int | None] = field(default_factory=dict)  # signal -> exit code; None: ignores it
    out_of_memory: bool = False


@dataclass(slots=True)
class _Task:
    """A running program. Its end is computed when asked for, so that no timer is needed."""

    program: Program
    clock: Callable[[], float]
    started_at: float | None = None
    exit: Exit | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: list["_FakeStream"] = field(default_factory=list)

    def start(self) -> None:
        if self.started_at is None:
            self.started_at = self.clock()
            for listener in self.listeners:
                listener.deliver(self.program)
            self._wake()

    def look(self) -> Exit | None:
        """How it ended, if it has by now."""
        end = self._ends_at()
        if self.exit is None and end is not None and end <= self.clock():
            reason = "out of memory" if self.program.out_of_memory else "exited"
            code = 128 + signals.SIGKILL if self.program.out_of_memory else self.program.code
            self.exit = Exit(code=code, reason=reason, finished_at=end)
        return self.exit

    def signal(self, number: int) -> None:
        if self.look():
            return
        if number == signals.SIGKILL or number not in self.program.handles:
            reason = f"killed by {signals.Signals(number).name}"
            self.exit = Exit(code=128 + number, reason=reason, finished_at=self.clock())
        elif (code := self.program.handles[number]) is not None:
            self.exit = Exit(code=code, reason="exited", finished_at=self.clock())
        self._wake()

    async def wait(self) -> Exit:
        while (ended := self.look()) is None:
            end = self._ends_at()
            changed = self.changed
            try:
                async with asyncio.timeout(None if end is None else max(0.0, end - self.clock())):
                    await changed.wait()
            except TimeoutError:
                continue
        return ended

    def _ends_at(self) -> float | None:
        if self.started_at is None or self.program.after_s is None:
            return None
        return self.started_at + self.program.after_s

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(slots=True)
class FakeHost:
    """What survives the daemon: the instances that run."""

    clock: Callable[[], float]
    programs: Mapping[tuple[str, ...], Program] = field(default_factory=dict)
    unknown: Program | None = field(default_factory=lambda: Program(after_s=None))  # None: not found in the image
    tasks: dict[str, _Task] = field(default_factory=dict)
    handles: dict[str, Handle] = field(default_factory=dict)

    def program(self, args: tuple[str, ...]) -> Program:
        program = self.programs.get(args, self.unknown)
        if program is None:
            raise invalid(f"command {args[0]!r} not found in the image", field="command")
        return program


class FakeRuntime:
    """Implements alveole.runtime.base.Runtime."""

    def __init__(self, host: FakeHost, name: str = "fake", capabilities: frozenset[Capability] | None = None) -> None:
        self._host = host
        self._name = name
        walls = frozenset({Capability.EXEC, Capability.ATTACH, Capability.PAUSE})
        self._capabilities = walls if capabilities is None else capabilities

    @property
    def name(self) -> str:
        return self._name

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._capabilities

    async def probe(self) -> str:
        return ""

    async def create(self, cell: Cell) -> Handle:
        await self.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)
        task = _Task(self._host.program(cell.process.args), self._host.clock)
        pid = _FIRST_PID + len(self._host.tasks)
        handle = Handle(
            runtime=self._name,
            id=cell.id,
            directory=str(cell.directory),
            run_directory=str(cell.run_directory),
            cgroup=cell.cgroup,
            pid=pid,
            pid_started=pid,
            monitor_pid=pid,
            monitor_started=pid,
            tty=cell.process.tty,
        )
        self._host.tasks[cell.id], self._host.handles[cell.id] = task, handle
        return handle

    async def start(self, handle: Handle) -> None:
        self._task(handle).start()

    async def signal(self, handle: Handle, signal: int) -> None:
        self._task(handle).signal(signal)

    async def kill(self, handle: Handle) -> None:
        self._task(handle).signal(signals.SIGKILL)

    async def wait(self, handle: Handle) -> Exit:
        return await self._task(handle).wait()

    async def delete(self, cell_id: str, directory: Path, run_directory: Path, cgroup: str) -> None:
        self._host.handles.pop(cell_id, None)
        if task := self._host.tasks.pop(cell_id, None):
            task.signal(signals.SIGKILL)

    async def recover(self, cell_id: str, directory: Path, run_directory: Path) -> Recovered:
        task = self._host.tasks.get(cell_id)
        if task is None:
            return Recovered(state=State.ABSENT, handle=None)
        begun = State.CREATED if task.started_at is None else State.RUNNING
        return Recovered(state=State.EXITED if task.look() else begun, handle=self._host.handles[cell_id])

    async def exec(self, handle: Handle, request: ExecRequest, process: Process) -> Stream:
        instance = self._task(handle)
        if instance.started_at is None or instance.look():
            raise conflict(f"instance {handle.id} is not running", hint="start it first")
        task = _Task(self._host.program(process.args), self._host.clock)
        stream = _FakeStream(task, owned=True)
        task.start()
        return stream

    async def attach(self, handle: Handle) -> Stream:
        task = self._task(handle)
        if task.look():
            raise conflict(f"instance {handle.id} has ended", hint="start it again, or read its logs")
        return _FakeStream(task, owned=False)

    async def pause(self, handle: Handle) -> None:
        self._task(handle)

    async def resume(self, handle: Handle) -> None:
        self._task(handle)

    async def rotate_logs(self, handle: Handle, log_path: Path) -> None:
        self._task(handle)

    def _task(self, handle: Handle) -> _Task:
        try:
            return self._host.tasks[handle.id]
        except KeyError:
            raise conflict(f"instance {handle.id} was deleted") from None


class _FakeStream:
    def __init__(self, task: _Task, *, owned: bool) -> None:
        self._task = task
        self._owned = owned
        self._chunks: deque[tuple[int, bytes]] = deque()
        self.written = b""
        task.listeners.append(self)

    def deliver(self, program: Program) -> None:
        self._chunks += [(number, data) for number, data in ((1, program.stdout), (2, program.stderr)) if data]

    async def write(self, data: bytes) -> None:
        self.written += data

    async def close_stdin(self) -> None:
        return

    async def resize(self, rows: int, columns: int) -> None:
        return

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._task.look():
                return
            changed = asyncio.ensure_future(self._task.changed.wait())
            ended = asyncio.ensure_future(self._task.wait())
            try:
                await asyncio.wait({changed, ended}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
                ended.cancel()

    async def wait(self) -> int:
        return (await self._task.wait()).code or 0

    async def close(self) -> None:
        if self in self._task.listeners:
            self._task.listeners.remove(self)
        if self._owned:
            self._task.signal(signals.SIGKILL)
