"""Instances run by an OCI engine: the whole Runtime contract once, for crun and runsc alike."""

import json
import resource
import secrets
import shutil
import signal as signals
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from alveole.host import pidfd
from alveole.host.blocking import in_thread
from alveole.host.cgroup import Cgroups
from alveole.host.process import Result, run
from alveole.model.agent import ExecRequest, Stream
from alveole.model.error import conflict, internal
from alveole.runtime import bundle, conmon, execution
from alveole.runtime.base import Capability, Cell, Exit, Handle, Process, Recovered, State
from alveole.runtime.conmon import Place
from alveole.runtime.faults import fault
from alveole.runtime.streams import AttachStream

ENGINE_TIMEOUT_S = 60.0


class Flavour(Protocol):
    """What one engine does differently from another."""

    name: str
    program: str
    options: tuple[str, ...]
    bundle: bundle.Engine
    capabilities: frozenset[Capability]
    exec_pid_option: str  # names the file that gets the pid of a command run by ``exec``, once it was started
    exec_pid_is_inside: bool  # that pid is of the engine's own kernel
    exec_console_socket: bool  # ``exec`` makes the terminal and sends it; else it takes the one it is run on

    async def probe(self) -> str:
        """Empty if this host can run it, else what is lacking and the fix."""
        ...

    def seccomp(self, capabilities: frozenset[str]) -> dict[str, Any]:
        """Fragment of the bundle."""
        ...

    def created(self, capabilities: frozenset[str], state: Path) -> None:
        """Called with the engine's state directory of an instance just created."""
        ...

    async def start_prefix(self) -> tuple[str, ...]:
        """argv that ``start`` is run under."""
        ...


class OciRuntime:
    """Implements alveole.runtime.base.Runtime."""

    def __init__(self, flavour: Flavour, cgroups: Cgroups, clock: Callable[[], float] = time.time) -> None:
        self._flavour = flavour
        self._cgroups = cgroups
        self._clock = clock
        self._program = shutil.which(flavour.program) or flavour.program
        memory = cgroups.layout.v1.get("memory")
        self._limits = bundle.HostLimits(
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            swap_limit=memory is None or (memory / "memory.memsw.limit_in_bytes").exists(),
        )

    @property
    def name(self) -> str:
        return self._flavour.name

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._flavour.capabilities

    async def probe(self) -> str:
        if not shutil.which(conmon.PROGRAM):
            return f"{conmon.PROGRAM} is not installed (install the package {conmon.PROGRAM})"
        return await self._flavour.probe()

    async def create(self, cell: Cell) -> Handle:
        place = Place(cell.id, cell.directory, cell.run_directory)
        if place.bundle.exists() or place.handle_file.exists():
            await self.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)
        try:
            return await self._create(cell, place)
        except BaseException:
            await self.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)
            raise

    async def _create(self, cell: Cell, place: Place) -> Handle:
        kept = frozenset(cell.process.capabilities)
        place.bundle.mkdir(mode=0o700)
        (place.bundle / "config.json").write_text(json.dumps(self._config(cell, kept)))
        try:
            pid = await conmon.create(
                place, self._engine(place), cell.log_path, tty=cell.process.tty, stdin=cell.process.stdin
            )
        except conmon.EngineFailed as error:
            raise fault(self.name, str(error), cell.process.args, cell.process.workdir) from error
        self._flavour.created(kept, place.engine_root / cell.id)
        monitor_pid, monitor_started = conmon.monitor(place)
        handle = Handle(
            runtime=self.name,
            id=cell.id,
            directory=str(cell.directory),
            run_directory=str(cell.run_directory),
            cgroup=cell.cgroup,
            pid=pid,
            pid_started=pidfd.started_at(pid) or 0,
            monitor_pid=monitor_pid,
            monitor_started=monitor_started,
            tty=cell.process.tty,
        )
        _replace(place.handle_file, handle.to_json())
        return handle

    def _config(self, cell: Cell, kept: frozenset[str]) -> dict[str, Any]:
        files = frozenset(mount.source for mount in cell.mounts if mount.source and not mount.source.is_dir())
        return bundle.bundle(cell, self._flavour.bundle, self._limits, self._flavour.seccomp(kept), files)

    async def start(self, handle: Handle) -> None:
        place = place_of(handle)
        result = await self._run(place, "start", place.id, prefix=await self._flavour.start_prefix())
        if result.code != 0 and await self._status(place) not in {"running", "stopped"}:
            process = json.loads((place.bundle / "config.json").read_bytes())["process"]
            raise fault(self.name, result.stderr.decode(errors="replace"), process["args"], process["cwd"])

    async def signal(self, handle: Handle, signal: int) -> None:
        place = place_of(handle)
        result = await self._run(place, "kill", place.id, str(signal))
        if result.code != 0 and await self._status(place) in {"created", "running"} and is_alive(handle):
            raise result.failure()

    async def kill(self, handle: Handle) -> None:
        await self._kill_all(handle.cgroup)
        await pidfd.wait_ended(handle.pid, handle.pid_started)

    async def wait(self, handle: Handle) -> Exit:
        place = place_of(handle)
        await pidfd.wait_ended(handle.monitor_pid, handle.monitor_started)
        code = conmon.exit_code(place)
        if code is None:
            await self.kill(handle)
            return Exit(code=None, reason="monitor lost", finished_at=self._clock())
        reason = reason_of(code, out_of_memory=self._cgroups.oom_kills(handle.cgroup) > 0)
        return Exit(code=code, reason=reason, finished_at=place.exit_file.stat().st_mtime)

    async def delete(self, cell_id: str, directory: Path, run_directory: Path, cgroup: str) -> None:
        # Without the engine, which refuses or waits in half-made states: all its processes are in the cgroup or
        # children of the monitor, all its state is in the bundle.
        place = Place(cell_id, directory, run_directory)
        if place.bundle.exists():
            await self._kill_all(cgroup)
            await conmon.end(place)
        await self._kill_all(cgroup)  # also what a monitor was still making
        await self._cgroups.remove(cgroup)
        for file in (place.handle_file, place.exit_file, place.oom_file):
            file.unlink(missing_ok=True)
        await in_thread(partial(_remove, place.bundle))

    async def recover(self, cell_id: str, directory: Path, run_directory: Path) -> Recovered:
        place = Place(cell_id, directory, run_directory)
        try:
            handle = Handle.from_json(place.handle_file.read_bytes())
        except FileNotFoundError:
            return Recovered(state=State.ABSENT, handle=None)
        if conmon.exit_code(place) is not None:
            return Recovered(state=State.EXITED, handle=handle)
        if not place.bundle.exists():  # the host was restarted
            return Recovered(state=State.ABSENT, handle=handle)
        if not pidfd.is_alive(handle.monitor_pid, handle.monitor_started):
            return Recovered(state=State.EXITED, handle=handle)
        return Recovered(state=await self._adopt(place, await self._status(place)), handle=handle)

    async def _adopt(self, place: Place, status: str) -> State:
        """What one is, whose monitor lives and that has not ended; ``status`` as the engine says."""
        return State.CREATED if status == "created" else State.RUNNING

    async def exec(self, handle: Handle, request: ExecRequest, process: Process) -> Stream:
        place = place_of(handle)
        if not is_alive(handle):
            raise conflict(f"instance {handle.id} is not running", hint="start it first")
        launcher = execution.EngineLauncher(
            id=place.id,
            engine=self._engine(place),
            pid_option=self._flavour.exec_pid_option,
            pid_is_inside=self._flavour.exec_pid_is_inside,
            makes_terminal=self._flavour.exec_console_socket,
            stem=place.bundle / f"exec-{secrets.token_hex(4)}",
        )
        try:
            return await execution.open_session(launcher, request, process, bundle.process(process, self._limits))
        except execution.NotStarted as error:
            raise fault(self.name, str(error), process.args, process.workdir) from error

    async def attach(self, handle: Handle) -> Stream:
        async def exit_code() -> int:
            code = (await self.wait(handle)).code
            if code is None:
                raise internal(f"how instance {handle.id} ended is not known: its monitor was lost")
            return code

        return await AttachStream.open(place_of(handle), exit_code, tty=handle.tty)

    async def pause(self, handle: Handle) -> None:
        await self._cgroups.freeze(handle.cgroup)

    async def resume(self, handle: Handle) -> None:
        self._cgroups.thaw(handle.cgroup)

    async def rotate_logs(self, handle: Handle, log_path: Path) -> None:
        await conmon.reopen_log(place_of(handle), log_path)

    async def _kill_all(self, cgroup: str) -> None:
        if not cgroup.strip("/"):
            raise internal("an instance without a cgroup of its own cannot be killed")  # that would kill the host
        await self._cgroups.kill(cgroup)

    def _engine(self, place: Place) -> tuple[str, ...]:
        return (self._program, "--root", str(place.engine_root), *self._flavour.options)

    async def _run(
        self,
        place: Place,
        *arguments: str,
        prefix: tuple[str, ...] = (),
        timeout_s: float = ENGINE_TIMEOUT_S,
        pass_fds: tuple[int, ...] = (),
    ) -> Result:
        argv = (*prefix, *self._engine(place), *arguments)
        return await run(argv, timeout_s=timeout_s, check=False, pass_fds=pass_fds)

    async def _status(self, place: Place) -> str:
        """created | running | stopped | paused, as the engine says; empty if it does not know the instance."""
        result = await self._run(place, "state", place.id)
        return str(json.loads(result.stdout)["status"]) if result.code == 0 else ""


def _remove(directory: Path) -> None:
    """Commands run in the instance that end meanwhile remove their own files."""
    while directory.exists():
        with suppress(FileNotFoundError):
            shutil.rmtree(directory)


def place_of(handle: Handle) -> Place:
    """Where its monitor and engine keep what belongs to it."""
    return Place(handle.id, Path(handle.directory), Path(handle.run_directory))


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(data)
    temporary.rename(path)


def is_alive(handle: Handle) -> bool:
    """Whether its first process, as the host sees it, has not ended."""
    return pidfd.is_alive(handle.pid, handle.pid_started)


def reason_of(code: int, *, out_of_memory: bool) -> str:
    """The monitor reports a death by signal N as 128 + N.

    When the kernel kills for lack of memory, the first process may be hit, or fail for want of the one that was.
    """
    names = {128 + number: number.name for number in signals.Signals}
    name = names.get(code, "")
    if out_of_memory and code != 0 and name in {"", "SIGKILL"}:
        return "out of memory"
    return f"killed by {name}" if name else "exited"
