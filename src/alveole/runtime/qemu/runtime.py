"""Machines: an instance behind its own kernel, run by QEMU.

The instance's OCI bundle is run by crun *inside* the guest, so that user, environment, mounts and limits mean there
what they mean in a container; QEMU itself is run by crun on the host, as its jail. So there are two bundles: one that
the guest gets as its seed, and one that conmon and crun run here.
"""

import math
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from alveole.host.blocking import in_thread
from alveole.host.cgroup import Cgroups
from alveole.host.mount import unmount
from alveole.host.probe.finding import Status
from alveole.host.probe.machine import kvm
from alveole.host.process import run
from alveole.model.agent import ExecRequest, Stream
from alveole.model.base import Record
from alveole.model.error import AlveoleError, conflict, internal, invalid
from alveole.runtime import bundle, execution
from alveole.runtime.base import Cell, Exit, Handle, Process, Recovered, State
from alveole.runtime.faults import fault
from alveole.runtime.oci import OciRuntime, is_alive, reason_of
from alveole.runtime.qemu import seed
from alveole.runtime.qemu.argv import CONSOLE, MACHINE_TYPE, PROGRAM, WORDS, Bind, Disk, Machine
from alveole.runtime.qemu.boot import BootFiles
from alveole.runtime.qemu.command import GuestLauncher
from alveole.runtime.qemu.guest import Guest
from alveole.runtime.qemu.jail import Furniture, Jail, jailed, make_place, make_root, user_of, with_devices
from alveole.runtime.streams import AttachStream

DEFAULT_MEMORY_BYTES = 512 << 20
LEAST_MEMORY_BYTES = 128 << 20
_BOOT_TIMEOUT_S = 120.0
_START_TIMEOUT_S = 60.0
_TOOL_TIMEOUT_S = 30.0
_WORDS_LIMIT_BYTES = 4096
_LIMITS = bundle.HostLimits(open_files=1 << 20, swap_limit=False)


class About(Record):
    """What is kept of a machine beside its handle, and told by ``inspect``."""

    machine_type: str
    accelerator: str
    cpu_model: str
    memory_mib: int
    cpus: int
    kernel: str
    control_address: str
    args: tuple[str, ...]
    workdir: str


class QemuRuntime(OciRuntime):
    """Implements alveole.runtime.base.Runtime."""

    def __init__(self, run_directory: Path, state: Path, cgroups: Cgroups, accelerator: str = "") -> None:
        """``run_directory`` is gone after a reboot, ``state`` persists; ``accelerator`` empty: as measured."""
        super().__init__(Jail(run_directory), cgroups)
        self._state = state
        self._boot = BootFiles(state)
        self._accelerator = accelerator

    async def probe(self) -> str:
        if lacking := await super().probe():
            return lacking
        for program, package in ((PROGRAM, "qemu-system-x86"), ("ssh", "openssh-client")):
            if not shutil.which(program):
                return f"{program} is not installed (install the package {package})"
        try:
            await self._boot.ensure()
        except AlveoleError as error:
            return f"{error.message} ({error.hint})" if error.hint else error.message
        return ""

    async def accelerator(self) -> str:
        """kvm where the host runs a guest's kernel natively, else tcg."""
        if not self._accelerator:
            self._accelerator = "kvm" if (await kvm()).status is Status.OK else "tcg"
        return self._accelerator

    async def create(self, cell: Cell) -> Handle:
        """Boot it up to where its guest waits for what it shall be."""
        try:
            return await self._boot_up(cell)
        except BaseException:
            await self.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)
            raise

    async def _boot_up(self, cell: Cell) -> Handle:
        await self.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)
        files = frozenset(mount.source for mount in cell.mounts if mount.source and mount.source.is_file())
        how = seed.plan(cell.mounts, files)
        machine = await self._machine(cell, how)
        boot = await self._boot.ensure()
        place = _own(cell.run_directory)
        await make_place(place, user_of(cell))
        await self._give_disks(cell, how)
        await self._write_seed(cell, how)
        about = About(
            machine_type=MACHINE_TYPE,
            accelerator=machine.accelerator,
            cpu_model="max",
            memory_mib=machine.memory_mib,
            cpus=machine.cpus,
            kernel=boot.kernel.version,
            control_address=machine.card.control_address,
            args=cell.process.args,
            workdir=cell.process.workdir,
        )
        (cell.directory / "machine.json").write_bytes(about.to_json())
        memory = await in_thread(lambda: self._empty_memory(machine.memory_mib))
        furniture = Furniture(root=make_root(self._state / "root"), place=place, boot=boot, memory=memory)
        handle = await super().create(jailed(cell, machine, how, furniture))
        await super().start(handle)
        await self._until(handle, "waiting", _BOOT_TIMEOUT_S)
        return handle

    async def _machine(self, cell: Cell, how: seed.Plan) -> Machine:
        if cell.card is None or cell.root_disk is None:
            raise internal(f"machine {cell.id} was given no disk or no network card")
        memory_bytes = cell.resources.memory_bytes or DEFAULT_MEMORY_BYTES
        if memory_bytes < LEAST_MEMORY_BYTES:
            raise invalid(
                f"a machine needs at least {LEAST_MEMORY_BYTES >> 20} MiB of memory",
                hint="its kernel takes some 60 MiB of it: give more with --memory",
                field="spec.resources.memory_bytes",
            )
        return Machine(
            id=cell.id,
            memory_mib=memory_bytes >> 20,
            cpus=max(1, math.ceil(cell.resources.cpus or 1)),
            accelerator=await self.accelerator(),
            card=cell.card,
            tty=cell.process.tty,
            stdin=cell.process.stdin,
            disks=(
                Disk(name="root", read_only=cell.read_only),
                *(Disk(name=name, read_only=mount.read_only) for name, mount in how.disks),
            ),
            binds=tuple(Bind(name=name, read_only=mount.read_only) for name, mount in how.binds),
        )

    def _config(self, cell: Cell, kept: frozenset[str]) -> dict[str, Any]:
        return with_devices(super()._config(cell, kept), self._accelerator)

    async def _give_disks(self, cell: Cell, how: seed.Plan) -> None:
        """QEMU opens them as their owner; whoever else may hold them later is root."""
        user = str(user_of(cell))
        disks = [cell.root_disk, *(mount.source for _, mount in how.disks)]
        await run(["chown", f"{user}:{user}", "--", *map(str, disks)], timeout_s=_TOOL_TIMEOUT_S)

    async def _write_seed(self, cell: Cell, how: seed.Plan) -> None:
        key = cell.run_directory / "key"
        make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", cell.id, "-f", str(key)]
        await run(make_key, timeout_s=_TOOL_TIMEOUT_S)
        public = key.with_suffix(".pub").read_text()
        archive = await in_thread(lambda: seed.make_seed(cell, how, public_key=public))
        path = cell.run_directory / "seed"
        path.touch(mode=0o600)
        path.write_bytes(archive)

    def _empty_memory(self, size_mib: int) -> Path:
        """A sparse file that reads as zeros: what the memory of a machine that boots is mapped from."""
        path = self._state / f"memory-{size_mib}"
        if not path.exists():
            with path.with_suffix(".new").open("wb") as file:
                file.truncate(size_mib << 20)
            path.with_suffix(".new").chmod(0o444)
            path.with_suffix(".new").rename(path)
        return path

    async def start(self, handle: Handle) -> None:
        guest, run_directory = _guest(handle), Path(handle.run_directory)
        archive = run_directory / "seed"
        if archive.exists():
            content = archive.read_bytes()
            await guest.send(f"seed {len(content)}", content)
        told = await self._until(handle, "started", _START_TIMEOUT_S)
        archive.unlink(missing_ok=True)
        if (words := told.failure) is not None:
            about = _about(handle)
            raise fault(self.name, words, about.args, about.workdir)

    async def _until(self, handle: Handle, what: str, timeout_s: float) -> Any:
        """Wait for the guest. A machine that ended is an error with QEMU's own last words, or the guest kernel's."""
        guest = _guest(handle)
        try:
            return await guest.until(
                lambda told: what in told.lines or told.failure is not None or told.exit is not None,
                alive=lambda: is_alive(handle),
                timeout_s=timeout_s,
            )
        except AlveoleError as error:
            place = _own(Path(handle.run_directory))
            words = _tail(place / WORDS) or _tail(place / CONSOLE)
            raise AlveoleError(error.code, f"{error.message}: {words}" if words else error.message) from error

    async def signal(self, handle: Handle, signal: int) -> None:
        await _guest(handle).send(f"signal {signal}")

    async def wait(self, handle: Handle) -> Exit:
        end = await super().wait(handle)
        told = _guest(handle).told().exit
        if told is not None:
            code, out_of_memory = told
            return replace(end, code=code, reason=reason_of(code, out_of_memory=out_of_memory))
        if end.reason == "exited":
            return replace(end, reason="powered off" if end.code == 0 else "guest kernel panicked")
        return end

    async def delete(self, cell_id: str, directory: Path, run_directory: Path, cgroup: str) -> None:
        await super().delete(cell_id, directory, run_directory, cgroup)
        await unmount(_own(run_directory))
        if _own(run_directory).exists():
            _own(run_directory).rmdir()
        for name in ("key", "key.pub", "seed"):
            (run_directory / name).unlink(missing_ok=True)
        (directory / "machine.json").unlink(missing_ok=True)

    async def recover(self, cell_id: str, directory: Path, run_directory: Path) -> Recovered:
        found = await super().recover(cell_id, directory, run_directory)
        if found.state is State.RUNNING and found.handle and not _guest(found.handle).told().has_started:
            return replace(found, state=State.CREATED)
        return found

    async def exec(self, handle: Handle, request: ExecRequest, process: Process) -> Stream:
        if not is_alive(handle):
            raise conflict(f"instance {handle.id} is not running", hint="start it first")
        launcher = GuestLauncher(
            id=handle.id,
            name=secrets.token_hex(8),
            guest=_guest(handle),
            machine_pid=handle.pid,
            address=_about(handle).control_address,
            key=Path(handle.run_directory, "key"),
        )
        try:
            return await execution.open_session(launcher, request, process, bundle.process(process, _LIMITS))
        except execution.NotStarted as error:
            raise fault(self.name, str(error), process.args, process.workdir) from error

    async def attach(self, handle: Handle) -> Stream:
        stream = await super().attach(handle)
        guest = _guest(handle)

        async def resize(rows: int, columns: int) -> None:
            await guest.send(f"resize {rows} {columns}")

        assert isinstance(stream, AttachStream)  # noqa: S101  (OciRuntime makes no other)
        stream.on_resize = resize if handle.tty else None
        return stream


def _own(run_directory: Path) -> Path:
    """What the jail has as PLACE."""
    return run_directory / "m"


def _guest(handle: Handle) -> Guest:
    return Guest(_own(Path(handle.run_directory)))


def _about(handle: Handle) -> About:
    return About.from_json(Path(handle.directory, "machine.json").read_bytes())


def _tail(path: Path) -> str:
    """The end of a text file that a hostile process may have written."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _WORDS_LIMIT_BYTES))
            lines = file.read(_WORDS_LIMIT_BYTES).decode(errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    return " ".join("".join(c for c in line if c.isprintable()) for line in lines[-4:]).strip()
