"""Making a template: boot a machine that has nothing of any instance, and keep what it is when it waits for a seed."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from alveole.host.blocking import in_thread
from alveole.host.process import run
from alveole.runtime.base import Card, Cell, Handle, Process, Workplace
from alveole.runtime.oci import is_alive
from alveole.runtime.qemu import capture
from alveole.runtime.qemu.argv import Machine
from alveole.runtime.qemu.guest import Guest
from alveole.runtime.qemu.jail import Furniture, Jail, jailed, make_place, remove_place, user_of
from alveole.runtime.qemu.template import MEMORY, TemplateRecord, Templates

_BOOT_TIMEOUT_S = 120.0
_TOOL_TIMEOUT_S = 30.0
_JAIL = "jail"  # directory of the machine, in that of the template


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """``machine`` is one of the shape; what it is beyond that does not matter."""

    jail: Jail
    workplace: Workplace
    machine: Machine
    furniture: Furniture  # without place and disks of its own
    run_directory: Path
    key: str
    qemu: str  # its version

    async def build(self, target: Path) -> TemplateRecord:
        """Write ``memory`` and ``state`` into ``target``."""
        cell = self._cell(target)
        await _clean(self.jail, cell.id, cell.directory, cell.run_directory, cell.cgroup)
        try:
            cell.directory.mkdir()
            cell.run_directory.mkdir(parents=True, exist_ok=True)
            return await self._build(cell, target)
        finally:
            await _clean(self.jail, cell.id, cell.directory, cell.run_directory, cell.cgroup)

    def _cell(self, target: Path) -> Cell:
        identifier, directory = _identifier(self.key), target / _JAIL
        return Cell(
            id=identifier,
            directory=directory,
            run_directory=self.run_directory / self.key,
            log_path=directory / "log",
            hostname=identifier,
            process=Process(args=(), env={}, workdir="/", uid=0, gid=0, tty=self.machine.tty),
            root=None,
            read_only=True,
            ids=self.workplace.ids,
            user_namespace=self.workplace.user_namespace,
            cgroup=f"{self.workplace.cgroup}/{identifier}",
        )

    async def _build(self, cell: Cell, target: Path) -> TemplateRecord:
        place, user = cell.run_directory / "m", user_of(cell)
        machine = replace(self.machine, id=cell.id, stdin=False, parts=())
        disk = cell.directory / "disk"
        with disk.open("wb") as file:
            file.truncate(machine.root_bytes)
        os.chown(disk, user, user)
        furniture = replace(self.furniture, place=place, disks={"root": disk}, binds={})
        await make_place(furniture, machine, user)
        handle = await self.jail.create(jailed(cell, machine, furniture, incoming=False))
        await _add_tap(handle.pid, machine.card, user)
        began = time.monotonic()
        await self.jail.start(handle)
        await wait_until_booted(handle, place)
        boot_s = time.monotonic() - began
        told = await capture.capture(handle, furniture.memory, place, target, go_on=False)
        (target / "pages").rename(target / MEMORY)
        (target / MEMORY).chmod(0o444)
        assert furniture.boot is not None  # noqa: S101  (no other machine goes on from a template)
        return TemplateRecord(
            key=self.key,
            memory_mib=machine.memory_mib,
            cpus=machine.cpus,
            tty=machine.tty,
            root_bytes=machine.root_bytes,
            accelerator=machine.accelerator,
            kernel=furniture.boot.kernel.version,
            initramfs=furniture.boot.initramfs.name,
            qemu=self.qemu,
            created_at=time.time(),
            boot_s=round(boot_s, 3),
            private_bytes=told["private_bytes"],
        )


async def sweep(jail: Jail, run_directory: Path, templates: Templates, cgroup: str) -> None:
    """End the machines that a killed daemon was making templates with; ``cgroup`` is the one that holds theirs."""
    for path in sorted(run_directory.glob("*")):
        identifier = _identifier(path.name)
        await _clean(jail, identifier, templates.half_made(path.name) / _JAIL, path, f"{cgroup}/{identifier}")


async def _clean(jail: Jail, identifier: str, directory: Path, run_directory: Path, cgroup: str) -> None:
    await jail.delete(identifier, directory, run_directory, cgroup)
    await remove_place(run_directory / "m")
    await in_thread(lambda: shutil.rmtree(run_directory, ignore_errors=True))
    await in_thread(lambda: shutil.rmtree(directory, ignore_errors=True))


def _identifier(key: str) -> str:
    return f"template-{key}"


async def wait_until_booted(handle: Handle, place: Path) -> None:
    alive: Callable[[], bool] = lambda: is_alive(handle)  # noqa: E731
    await Guest(place).until(lambda told: told.is_waiting, alive=alive, timeout_s=_BOOT_TIMEOUT_S)


async def _add_tap(pid: int, card: Card, user: int) -> None:
    """In the new network namespace of a jail: it leads nowhere."""
    enter = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "tuntap", "add", card.device]
    await run([*enter, "mode", "tap", "user", str(user), "vnet_hdr"], timeout_s=_TOOL_TIMEOUT_S)
