"""Machines that boot the disk of a whole operating system. Beside QEMU's monitor, only the system itself acts in them.

``running`` means that QEMU runs: when a system is up, only the system knows.
"""

import asyncio
import logging
import math
import signal as signals
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alveole.host import pidfd
from alveole.host.blocking import in_thread
from alveole.host.process import run
from alveole.host.qmp import connected
from alveole.model.agent import Stream
from alveole.model.base import Record
from alveole.model.error import AlveoleError, internal, invalid, unsupported
from alveole.runtime.base import Cell, Exit, Handle
from alveole.runtime.oci import is_alive
from alveole.runtime.qemu import capture, system_argv
from alveole.runtime.qemu.argv import MACHINE_TYPE, PROCESSOR, Machine
from alveole.runtime.qemu.capture import monitor_socket
from alveole.runtime.qemu.jail import Furniture, Jail, jailed, make_place, make_root, own_file, user_of
from alveole.runtime.qemu.template import MEMORY, STATE
from alveole.runtime.qemu.words import with_words

log = logging.getLogger(__name__)
DEFAULT_MEMORY_BYTES = 1 << 30
LEAST_MEMORY_BYTES = 64 << 20
POWER_BUTTON = frozenset({signals.SIGTERM, signals.SIGINT, signals.SIGPWR})
"""What asks any other instance to end presses a system's power button."""

_TOOL_TIMEOUT_S = 30.0
_SECTOR_BYTES = 512
_RECORD = "system.json"


class About(Record):
    """What is kept of it beside its handle."""

    machine_type: str
    accelerator: str
    processor: str
    memory_mib: int
    cpus: int
    qemu: str
    goes_on: bool  # from a captured moment, instead of booting
    shares_identity: bool = False  # its names and keys inside are those of the one that it was forked from


def is_system(handle: Handle) -> bool:
    return Path(handle.directory, _RECORD).exists()


class Systems:
    """What a machine's runtime does for those."""

    def __init__(
        self,
        jail: Jail,
        run_directory: Path,
        accelerator: Callable[[Cell], Awaitable[str]],
        version: Callable[[], Awaitable[str]],
        empty_memory: Callable[[int], Path],
    ) -> None:
        """``version`` is QEMU's; ``empty_memory`` gives a file of so many MiB that reads as zeros; it blocks."""
        self._jail = jail
        self._run_directory = run_directory
        self._accelerator = accelerator
        self._version = version
        self._empty_memory = empty_memory

    async def create(self, cell: Cell) -> Handle:
        """Make its jail. QEMU does not run in it before it is started, unless it goes on from a captured moment: then
        it stands still there. What is left on failure, ``delete`` removes."""
        machine = await self._machine(cell)
        await in_thread(lambda: _check_boots(cell))
        furniture = await self._furniture(cell, machine)
        if cell.origin is not None:
            furniture = replace(furniture, memory=cell.origin / MEMORY)
        furniture = replace(furniture, memory=own_file(cell, MEMORY, furniture.memory))
        await make_place(furniture, machine, user_of(cell))
        owner = f"{user_of(cell)}:{user_of(cell)}"
        await run(["chown", owner, "--", *map(str, furniture.disks.values())], timeout_s=_TOOL_TIMEOUT_S)
        about = About(
            machine_type=MACHINE_TYPE,
            accelerator=machine.accelerator,
            processor=PROCESSOR,
            memory_mib=machine.memory_mib,
            cpus=machine.cpus,
            qemu=await self._version(),
            goes_on=cell.origin is not None,
            shares_identity=await in_thread(lambda: _shares_identity(cell)),
        )
        (cell.directory / _RECORD).write_bytes(about.to_json())
        inside = jailed(cell, machine, furniture, incoming=False)
        args = system_argv.command(machine, incoming=about.goes_on)
        handle = await self._jail.create(replace(inside, process=replace(inside.process, args=args)))
        if cell.origin is not None:
            await self._jail.start(handle)
            try:
                await capture.load(
                    handle, furniture.memory, furniture.place, cell.origin / STATE, cell.origin / "pages"
                )
            except AlveoleError as error:
                raise with_words(error, furniture.place) from error
        return handle

    async def _machine(self, cell: Cell) -> Machine:
        if cell.card is None or cell.root_disk is None or cell.seed_disk is None:
            raise internal(f"machine {cell.id} was given no disks or no network card")
        memory_bytes = cell.resources.memory_bytes or DEFAULT_MEMORY_BYTES
        if memory_bytes < LEAST_MEMORY_BYTES:
            raise invalid(
                f"an operating system needs at least {LEAST_MEMORY_BYTES >> 20} MiB of memory",
                hint="give more with --memory; if nothing is said it has 1 GiB",
                field="spec.resources.memory_bytes",
            )
        return Machine(
            id=cell.id,
            memory_mib=memory_bytes >> 20,
            cpus=max(1, math.ceil(cell.resources.cpus or 1)),
            accelerator=await self._accelerator(cell),
            card=cell.card,
            tty=True,
            stdin=True,
            root_bytes=cell.root_disk.stat().st_size,
            parts=(system_argv.SEED,),
        )

    async def _furniture(self, cell: Cell, machine: Machine) -> Furniture:
        assert cell.root_disk is not None and cell.seed_disk is not None  # noqa: S101, PT018  (_machine has looked)
        return Furniture(
            root=make_root(self._run_directory / "jail"),
            place=_place(cell.run_directory),
            boot=None,
            memory=await in_thread(lambda: self._empty_memory(machine.memory_mib)),
            disks={"root": cell.root_disk, system_argv.SEED.name: cell.seed_disk},
            binds={},
        )

    @staticmethod
    def forget(directory: Path) -> None:
        (directory / _RECORD).unlink(missing_ok=True)

    @staticmethod
    def describe(handle: Handle) -> Mapping[str, Any]:
        return _about(handle).model_dump(exclude={"goes_on"})

    @staticmethod
    async def keep_about(handle: Handle, directory: Path) -> None:
        """Beside what is captured of it: one that was forked and then slept still shares its identity."""
        (directory / _RECORD).write_bytes(Path(handle.directory, _RECORD).read_bytes())

    async def start(self, handle: Handle) -> None:
        """Returns when QEMU runs. Raises INTERNAL with its own words if it ended instead."""
        if not _about(handle).goes_on:
            await self._jail.start(handle)
        place = _place(Path(handle.run_directory))
        answer = asyncio.ensure_future(_ask(handle, "cont"))
        end = asyncio.ensure_future(pidfd.wait_ended(handle.pid, handle.pid_started))
        try:
            await asyncio.wait({answer, end}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise internal("the machine ended when it was started")
            answer.result()
        except AlveoleError as error:
            raise with_words(error, place) from error
        finally:
            for task in (answer, end):
                task.cancel()
            await asyncio.wait({answer, end})

    async def signal(self, handle: Handle, signal: int) -> None:
        """A system may not listen to its power button, above all while it boots; then nothing happens."""
        if signal == signals.SIGKILL:
            await self._jail.kill(handle)
        elif signal not in POWER_BUTTON:
            names = ", ".join(sorted(signals.Signals(number).name for number in POWER_BUTTON))
            raise unsupported(
                f"signal {signal} cannot be sent to a whole operating system",
                hint=f"{names} press its power button, SIGKILL ends it at once",
            )
        elif is_alive(handle):
            await self._press(handle)

    async def _press(self, handle: Handle) -> None:
        """Whoever stops it goes on to kill it when this was of no use."""
        try:
            await _ask(handle, "system_powerdown")
        except AlveoleError as error:
            if is_alive(handle):
                log.warning("the power button of machine %s: %s", handle.id, error)

    async def wait(self, handle: Handle) -> Exit:
        end = await self._jail.wait(handle)
        if end.reason == "exited":
            return replace(end, reason="powered off" if end.code == 0 else "guest kernel panicked")
        return end

    async def attach(self, handle: Handle) -> Stream:
        """Its serial console."""
        return await self._jail.attach(handle)

    async def exec(self, handle: Handle) -> Stream:
        raise unsupported(
            f"instance {handle.id} is a whole operating system: no command can be run in it from outside",
            hint="log in at its console (alveole console NAME), or by SSH at its address",
        )


def _check_boots(cell: Cell) -> None:
    assert cell.root_disk is not None  # noqa: S101  (_machine has looked)
    with cell.root_disk.open("rb") as disk:
        if not system_argv.boots_by_bios(disk.read(_SECTOR_BYTES)):
            raise unsupported(
                "the disk has no boot loader that a BIOS starts",
                hint="use an image that boots by BIOS: one for UEFI alone, or with its kernel beside it, does not",
            )


def _shares_identity(cell: Cell) -> bool:
    """Nothing of ours is inside that could renew it; a boot is the system's own chance to."""
    if cell.origin is None or not cell.woken:
        return cell.origin is not None
    about = cell.origin / _RECORD
    return about.exists() and About.from_json(about.read_bytes()).shares_identity


async def _ask(handle: Handle, command: str) -> None:
    async with connected(monitor_socket(_place(Path(handle.run_directory))), handle.id) as monitor:
        await monitor.execute(command)


def _about(handle: Handle) -> About:
    return About.from_json(Path(handle.directory, _RECORD).read_bytes())


def _place(run_directory: Path) -> Path:
    """What the jail has as PLACE."""
    return run_directory / "m"
