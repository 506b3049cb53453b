"""Machines: an instance behind its own kernel, run by QEMU.

The instance's OCI bundle is run by crun *inside* the guest, so that user, environment, mounts and limits mean there
what they mean in a container; QEMU itself is run by crun on the host, as its jail. So there are two bundles: one that
the guest gets as its seed, and one that conmon and crun run here.
"""

import asyncio
import logging
import math
import secrets
import shutil
import signal as signals
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alveole.host import pidfd
from alveole.host.blocking import in_thread
from alveole.host.cgroup import Cgroups
from alveole.host.probe.finding import Status
from alveole.host.probe.machine import kvm
from alveole.host.process import run
from alveole.model.agent import ExecRequest, Stream
from alveole.model.base import Record
from alveole.model.error import AlveoleError, conflict, internal, invalid, unsupported
from alveole.runtime import bundle, execution
from alveole.runtime.base import Capability, Cell, CellMount, Exit, Handle, Process, Recovered, State
from alveole.runtime.faults import fault
from alveole.runtime.oci import is_alive, reason_of
from alveole.runtime.qemu import capture, plugging, seed
from alveole.runtime.qemu.argv import MACHINE_TYPE, PROCESSOR, PROGRAM, Machine, Part
from alveole.runtime.qemu.boot import Boot, BootFiles
from alveole.runtime.qemu.build_template import wait_until_booted
from alveole.runtime.qemu.command import GuestLauncher
from alveole.runtime.qemu.guest import Guest, Told
from alveole.runtime.qemu.jail import (
    KVM,
    Furniture,
    Jail,
    jailed,
    make_place,
    make_root,
    own_file,
    remove_place,
    user_of,
)
from alveole.runtime.qemu.system import Systems, is_system
from alveole.runtime.qemu.template import MEMORY, STATE
from alveole.runtime.qemu.template_pool import QemuTemplates
from alveole.runtime.qemu.words import with_words
from alveole.runtime.streams import AttachStream

log = logging.getLogger(__name__)
DEFAULT_MEMORY_BYTES = 512 << 20
LEAST_MEMORY_BYTES = 128 << 20
_START_TIMEOUT_S = 60.0
_FLUSH_TIMEOUT_S = 5.0
_SLOTS = "slots.json"
_REQUESTS = ("seed", "renew")
_STARTING = 8  # at once on this host: each is quick then, and none waits for others longer than it is waited for
_CONNECTING = 4  # at once to one guest: its server resets the sixth connection that has not shown its key yet
_TOOL_TIMEOUT_S = 30.0
_GUEST_LIMITS = bundle.HostLimits(open_files=1 << 20, swap_limit=False)


class About(Record):
    """What is kept of a machine beside its handle."""

    machine_type: str
    accelerator: str
    processor: str
    memory_mib: int
    cpus: int
    kernel: str
    qemu: str
    template: str  # key of the one it went on from; empty: it booted
    control_address: str
    args: tuple[str, ...]
    workdir: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What a machine begins from: zeroed memory (it boots), a template, or what another instance was."""

    memory: Path
    state: Path | None = None  # None: it boots
    pages: Path | None = None  # that differ from ``memory``
    slots: Path | None = None  # where its disks are plugged in; None: a template, which has none
    template: str = ""  # its key


class QemuRuntime:
    """Implements alveole.runtime.base.Runtime."""

    def __init__(self, run_directory: Path, state: Path, cgroups: Cgroups, accelerator: str = "") -> None:
        """``run_directory`` is gone after a reboot, ``state`` persists; ``accelerator`` empty: as measured."""
        self._jail = Jail(run_directory, cgroups)
        self._run_directory = run_directory
        self._state = state
        self._boot = BootFiles(state)
        self._accelerator = accelerator
        self._version = ""
        self._connecting = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(_CONNECTING))
        self._starting = asyncio.Semaphore(_STARTING)
        self._memory = asyncio.Lock()  # one at a time makes the files that machines boot with
        self.templates = QemuTemplates(
            self._jail,
            self._boot,
            self._qemu,
            self._ensure_empty_memory,
            state=state,
            run_directory=run_directory,
        )
        self._systems = Systems(self._jail, run_directory, self._accelerator_of, self._qemu, self._empty_memory)

    @property
    def name(self) -> str:
        return self._jail.name

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._jail.capabilities

    async def probe(self) -> str:
        if lacking := await self._jail.probe():
            return lacking
        for program, package in ((PROGRAM, "qemu-system-x86"), ("ssh", "openssh-client")):
            if not shutil.which(program):
                return f"{program} is not installed (install the package {package})"
        try:
            await self._boot.ensure()
            await self._qemu()
        except AlveoleError as error:
            return f"{error.message} ({error.hint})" if error.hint else error.message
        return ""

    async def open(self, cgroup: str) -> None:
        """To be called first; ``cgroup`` is the one that holds those of all instances."""
        await self.templates.open(cgroup)

    async def accelerator(self) -> str:
        """kvm where the host runs a guest's kernel natively, else tcg."""
        if not self._accelerator:
            self._accelerator = "kvm" if (await kvm()).status is Status.OK else "tcg"
        return self._accelerator

    async def _accelerator_of(self, cell: Cell) -> str:
        if cell.accelerator == "kvm" and not KVM.exists():
            raise unsupported("this host has no /dev/kvm", hint="leave out --accel: QEMU interprets the machine then")
        return cell.accelerator or await self.accelerator()

    async def _qemu(self) -> str:
        if not self._version:
            told = await run([PROGRAM, "--version"], timeout_s=_TOOL_TIMEOUT_S)
            self._version = told.text.partition("\n")[0].removeprefix("QEMU emulator version ")
        return self._version

    # --- making ------------------------------------------------------------------------------------------------------

    async def create(self, cell: Cell) -> Handle:
        """Bring it to where its guest waits for what it shall be."""
        try:
            await self.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)
            return await (self._systems.create(cell) if cell.seed_disk else self._create(cell))
        except BaseException:
            await self.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)
            raise

    async def _create(self, cell: Cell) -> Handle:
        files = frozenset(mount.source for mount in cell.mounts if mount.source and mount.source.is_file())
        how = seed.plan(cell.mounts, files)
        machine = await self._machine(cell, how)
        boot = await self._boot.ensure()
        furniture = await self._furniture(cell, how, boot, machine)
        begin = _own(cell, await self._beginning(cell, machine, furniture, boot))
        furniture = replace(furniture, memory=begin.memory)
        await make_place(furniture, machine, user_of(cell))
        await self._give_disks(cell, how)
        await self._write_seed(cell, how)
        await self._note(cell, machine, boot, begin)
        handle = await self._jail.create(jailed(cell, machine, furniture, incoming=begin.state is not None))
        await self._jail.start(handle)
        try:
            await _begin(handle, begin, furniture, machine.parts)
        except AlveoleError as error:
            raise with_words(error, furniture.place) from error
        (cell.directory / STATE).unlink(missing_ok=True)
        return handle

    async def _beginning(self, cell: Cell, machine: Machine, furniture: Furniture, boot: Boot) -> Beginning:
        if cell.origin is not None:
            there = cell.origin
            return Beginning(memory=there / MEMORY, state=there / STATE, pages=there / "pages", slots=there / _SLOTS)
        if not cell.template:
            return Beginning(memory=furniture.memory)
        template = await self.templates.of(cell, machine, boot)
        return Beginning(memory=template.memory, state=template.state, template=template.directory.name)

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
            accelerator=await self._accelerator_of(cell),
            card=cell.card,
            tty=cell.process.tty,
            stdin=cell.process.stdin,
            root_bytes=cell.root_disk.stat().st_size,
            parts=(
                *(Part(name=name, read_only=mount.read_only, is_disk=True) for name, mount in how.disks),
                *(Part(name=name, read_only=mount.read_only, is_disk=False) for name, mount in how.binds),
            ),
        )

    async def _furniture(self, cell: Cell, how: seed.Plan, boot: Boot, machine: Machine) -> Furniture:
        assert cell.root_disk is not None  # noqa: S101  (_machine has looked)
        return Furniture(
            root=make_root(self._run_directory / "jail"),
            place=_place(cell.run_directory),
            boot=boot,
            memory=await self._ensure_empty_memory(machine.memory_mib),
            disks={"root": cell.root_disk, **{name: mount.source for name, mount in how.disks if mount.source}},
            binds={name: mount.source for name, mount in how.binds if mount.source},
        )

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
        verb, make = ("renew", seed.make_renewal) if cell.origin else ("seed", seed.make_seed)
        archive = await in_thread(lambda: make(cell, how, public_key=public, boot_id=str(uuid.uuid4())))
        path = cell.run_directory / verb
        path.touch(mode=0o600)
        path.write_bytes(archive)

    async def _note(self, cell: Cell, machine: Machine, boot: Boot, begin: Beginning) -> None:
        about = About(
            machine_type=MACHINE_TYPE,
            accelerator=machine.accelerator,
            processor=PROCESSOR,
            memory_mib=machine.memory_mib,
            cpus=machine.cpus,
            kernel=boot.kernel.version,
            qemu=await self._qemu(),
            template=begin.template,
            control_address=machine.card.control_address,
            args=cell.process.args,
            workdir=cell.process.workdir,
        )
        (cell.directory / "machine.json").write_bytes(about.to_json())

    async def _ensure_empty_memory(self, size_mib: int) -> Path:
        async with self._memory:
            return await in_thread(lambda: self._empty_memory(size_mib))

    def _empty_memory(self, size_mib: int) -> Path:
        """A sparse file that reads as zeros: what the memory of a machine that boots is mapped from."""
        path = self._state / f"memory-{size_mib}"
        if not path.exists():
            new = self._state / f"memory-{size_mib}.new"
            with new.open("wb") as file:
                file.truncate(size_mib << 20)
            new.chmod(0o444)
            new.rename(path)
        return path

    async def delete(self, cell_id: str, directory: Path, run_directory: Path, cgroup: str) -> None:
        self._connecting.pop(cell_id, None)
        await self._jail.delete(cell_id, directory, run_directory, cgroup)
        await remove_place(_place(run_directory))
        for name in ("key", "key.pub", *_REQUESTS):
            (run_directory / name).unlink(missing_ok=True)
        self._systems.forget(directory)
        await in_thread(lambda: _forget(directory))

    # --- running -----------------------------------------------------------------------------------------------------

    async def start(self, handle: Handle) -> None:
        if is_system(handle):
            await self._systems.start(handle)
            return
        async with self._starting:
            await self._start(handle)

    async def _start(self, handle: Handle) -> None:
        guest, archive = _guest(handle), _request(handle)
        if archive is not None:
            content = archive.read_bytes()
            await capture.go_on(handle, _place(Path(handle.run_directory)))  # it stands still if it is a fork
            await guest.send(f"{archive.name} {len(content)} {time.time():.0f}", content)
        try:
            told = await guest.until(_is_decided, alive=lambda: is_alive(handle), timeout_s=_START_TIMEOUT_S)
        except AlveoleError as error:
            raise with_words(error, _place(Path(handle.run_directory))) from error
        if archive is not None:
            archive.unlink()
        if (words := told.failure) is not None:
            about = _about(handle)
            raise fault(self.name, words, about.args, about.workdir)

    def describe(self, handle: Handle) -> Mapping[str, Any]:
        if is_system(handle):
            return self._systems.describe(handle)
        return _about(handle).model_dump(exclude={"args", "workdir", "control_address"})

    async def signal(self, handle: Handle, signal: int) -> None:
        if is_system(handle):
            await self._systems.signal(handle, signal)
            return
        await _guest(handle).send(f"signal {signal}")

    async def kill(self, handle: Handle) -> None:
        """Its guest is given a moment to write to its disks what its processes had written to files."""
        guest = _guest(handle)
        if not is_system(handle) and guest.told().has_started and is_alive(handle):
            await guest.send(f"signal {signals.SIGKILL}")
            with suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                    await pidfd.wait_ended(handle.pid, handle.pid_started)
        await self._jail.kill(handle)

    async def wait(self, handle: Handle) -> Exit:
        if is_system(handle):
            return await self._systems.wait(handle)
        end = await self._jail.wait(handle)
        told = _guest(handle).told().exit
        if told is not None:
            code, out_of_memory = told
            return replace(end, code=code, reason=reason_of(code, out_of_memory=out_of_memory))
        if end.reason == "exited":
            return replace(end, reason="powered off" if end.code == 0 else "guest kernel panicked")
        return end

    async def recover(self, cell_id: str, directory: Path, run_directory: Path) -> Recovered:
        found = await self._jail.recover(cell_id, directory, run_directory)
        if found.state is State.RUNNING and found.handle:
            if not is_system(found.handle) and not _guest(found.handle).told().has_started:
                return replace(found, state=State.CREATED)
            with suppress(AlveoleError):  # it may just end
                await capture.go_on(found.handle, _place(run_directory))  # a daemon that captured it may have died
        return found

    async def exec(self, handle: Handle, request: ExecRequest, process: Process) -> Stream:
        if not is_alive(handle):
            raise conflict(f"instance {handle.id} is not running", hint="start it first")
        if is_system(handle):
            return await self._systems.exec(handle)
        launcher = GuestLauncher(
            id=handle.id,
            name=secrets.token_hex(8),
            guest=_guest(handle),
            machine_pid=handle.pid,
            address=_about(handle).control_address,
            key=Path(handle.run_directory, "key"),
        )
        try:
            specification = bundle.process(process, _GUEST_LIMITS)
            async with self._connecting[handle.id]:
                return await execution.open_session(launcher, request, process, specification)
        except execution.NotStarted as error:
            raise fault(self.name, str(error), process.args, process.workdir) from error

    async def attach(self, handle: Handle) -> Stream:
        if is_system(handle):
            return await self._systems.attach(handle)
        stream, guest = await self._jail.attach(handle), _guest(handle)

        async def resize(rows: int, columns: int) -> None:
            await guest.send(f"resize {rows} {columns}")

        assert isinstance(stream, AttachStream)  # noqa: S101  (OciRuntime makes no other)
        stream.on_resize = resize if handle.tty else None
        stream.exit_code = lambda: self._exit_code(handle)
        return stream

    async def _exit_code(self, handle: Handle) -> int:
        code = (await self.wait(handle)).code
        if code is None:
            raise internal(f"how instance {handle.id} ended is not known: its monitor was lost")
        return code

    async def plug(self, handle: Handle, volume_id: str, disk: CellMount) -> None:
        await plugging.plug_disk(
            _place(Path(handle.run_directory)),
            _guest(handle),
            seed.disk_name(volume_id),
            disk,
            alive=lambda: is_alive(handle),
        )

    async def unplug(self, handle: Handle, volume_id: str) -> None:
        place, name = _place(Path(handle.run_directory)), seed.disk_name(volume_id)
        await plugging.unplug_disk(place, _guest(handle), name, alive=lambda: is_alive(handle))

    async def flush(self, handle: Handle) -> None:
        if not is_system(handle):
            await plugging.flush_files(_guest(handle), handle.id, alive=lambda: is_alive(handle))

    async def capture(
        self, handle: Handle, directory: Path, while_still: Callable[[], Awaitable[None]], *, go_on: bool
    ) -> Mapping[str, Any]:
        memory = Path(handle.directory, MEMORY)
        (directory / MEMORY).hardlink_to(memory)
        if is_system(handle):
            await self._systems.keep_about(handle, directory)
        place = _place(Path(handle.run_directory))
        slots = directory / _SLOTS
        return await capture.capture(
            handle, memory, place, directory, while_still=while_still, go_on=go_on, slots=slots
        )

    async def pause(self, handle: Handle) -> None:
        await self._jail.pause(handle)

    async def resume(self, handle: Handle) -> None:
        await self._jail.resume(handle)

    async def rotate_logs(self, handle: Handle, log_path: Path) -> None:
        await self._jail.rotate_logs(handle, log_path)


def _forget(directory: Path) -> None:
    """Takes its time where a machine was the last to have the memory of a template that is gone."""
    for name in ("machine.json", "kvm", MEMORY, STATE):
        (directory / name).unlink(missing_ok=True)


def _own(cell: Cell, begin: Beginning) -> Beginning:
    """With names of its own for its files. To be called before anything is awaited: then a template may be removed."""
    own = replace(begin, memory=own_file(cell, MEMORY, begin.memory))
    if begin.template and begin.state:
        own = replace(own, state=own_file(cell, STATE, begin.state))
    return own


async def _begin(handle: Handle, begin: Beginning, furniture: Furniture, parts: tuple[Part, ...]) -> None:
    """Bring it to where its guest waits; one that goes on from what another was stands still there."""
    place, name = furniture.place, handle.id
    slots: dict[str, int] = {}
    if begin.state is None:
        await wait_until_booted(handle, place)
    else:
        if begin.slots is not None:  # what it had plugged in is part of what it is
            slots = plugging.slots_of(begin.slots, parts)
            await plugging.plug_parts(place, name, [part for part in parts if part.name in slots], slots)
        await capture.load(handle, furniture.memory, place, begin.state, begin.pages)
        if begin.slots is None:
            await capture.go_on(handle, place)
    await plugging.plug_parts(place, name, [part for part in parts if part.name not in slots], {})


def _is_decided(told: Told) -> bool:
    return told.has_started or told.failure is not None or told.exit is not None


def _place(run_directory: Path) -> Path:
    """What the jail has as PLACE."""
    return run_directory / "m"


def _request(handle: Handle) -> Path | None:
    """What its guest has still to be told; the file's name is the verb."""
    found = (Path(handle.run_directory, verb) for verb in _REQUESTS)
    return next((path for path in found if path.exists()), None)


def _guest(handle: Handle) -> Guest:
    return Guest(_place(Path(handle.run_directory)))


def _about(handle: Handle) -> About:
    return About.from_json(Path(handle.directory, "machine.json").read_bytes())
