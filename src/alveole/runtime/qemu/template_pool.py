"""The templates of machines on this host: made when first wanted, shown, removed, made afresh."""

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime
from pathlib import Path

from alveole.host.blocking import in_thread
from alveole.model.error import AlveoleError, conflict, internal
from alveole.model.template import Template as Shown
from alveole.runtime.base import Card, Cell, Handle, Workplace
from alveole.runtime.qemu import build_template
from alveole.runtime.qemu.argv import Machine, shape
from alveole.runtime.qemu.boot import Boot, BootFiles
from alveole.runtime.qemu.build_template import Builder
from alveole.runtime.qemu.jail import Furniture, Jail, make_root
from alveole.runtime.qemu.template import MEMORY, Template, TemplateRecord, Templates, absent, key_of

log = logging.getLogger(__name__)
UNUSED_S = 30 * 86400.0
"""A template that no machine went on from for so long is removed when the daemon starts: it is soon made again."""


class QemuTemplates:
    """Implements alveole.runtime.base.TemplatePool."""

    def __init__(
        self,
        jail: Jail,
        boot: BootFiles,
        version: Callable[[], Awaitable[str]],
        empty_memory: Callable[[int], Awaitable[Path]],
        *,
        state: Path,
        run_directory: Path,
    ) -> None:
        """``version`` is QEMU's; ``empty_memory`` gives a file of so many MiB that reads as zeros."""
        self.files = Templates(state / "templates")
        self._jail = jail
        self._boot = boot
        self._version = version
        self._empty_memory = empty_memory
        self._root = run_directory / "jail"
        self._run_directory = run_directory / "t"

    async def open(self, cgroup: str) -> None:
        """To be called first. Ends what a killed daemon was making, and forgets templates that nobody can or did use;
        ``cgroup`` is the one that holds those of all instances."""
        await build_template.sweep(self._jail, self._run_directory, self.files, cgroup)
        try:
            versions = await self._versions(await self._boot.ensure())
        except AlveoleError as error:
            log.warning("templates of machines are kept as they are: %s", error)
            return
        oldest = time.time() - UNUSED_S
        await self.files.sweep(lambda files, record: _versions_of(record) == versions and files.used_at() > oldest)

    async def of(self, cell: Cell, machine: Machine, boot: Boot) -> Template:
        """The one of a machine's shape; ``cell`` is that of the first that wants it. See ``Templates.ensure``."""
        if cell.ids is None:
            raise internal(f"machine {cell.id} was given no id range")
        workplace = Workplace(ids=cell.ids, user_namespace=cell.user_namespace, cgroup=cell.cgroup.rpartition("/")[0])
        builder = await self._builder(workplace, machine, boot)
        return await self.files.ensure(builder.key, builder.build)

    async def _builder(self, workplace: Workplace, machine: Machine, boot: Boot) -> Builder:
        furniture = Furniture(
            root=make_root(self._root),
            place=self._run_directory,
            boot=boot,
            memory=await self._empty_memory(machine.memory_mib),
            disks={},
            binds={},
        )
        return Builder(
            jail=self._jail,
            workplace=workplace,
            machine=machine,
            furniture=furniture,
            run_directory=self._run_directory,
            key=key_of(shape(machine), await self._versions(boot)),
            qemu=await self._version(),
        )

    async def _versions(self, boot: Boot) -> tuple[str, str, str]:
        return await self._version(), boot.kernel.version, boot.initramfs.name

    async def shown(self, running: Collection[Handle]) -> tuple[Shown, ...]:
        return await in_thread(lambda: self._shown(running))

    def _shown(self, running: Collection[Handle]) -> tuple[Shown, ...]:
        mapped = [_inode(Path(handle.directory, MEMORY)) for handle in running if handle.runtime == self._jail.name]
        found = []
        for template, record in self.files.all():
            try:
                found.append(self._one(template, record, mapped))
            except FileNotFoundError:  # removed since, or damaged: then it cannot be used, and is made anew when wanted
                continue
        return tuple(found)

    def _one(self, template: Template, record: TemplateRecord, mapped: list[tuple[int, int] | None]) -> Shown:
        size_bytes, used_at = template.size_bytes(), template.used_at()
        return Shown(
            key=record.key,
            memory_bytes=record.memory_mib << 20,
            cpus=record.cpus,
            tty=record.tty,
            accelerator=record.accelerator,
            kernel=record.kernel,
            qemu=record.qemu,
            size_bytes=size_bytes,
            created_at=datetime.fromtimestamp(record.created_at, tz=UTC),
            used_at=datetime.fromtimestamp(used_at, tz=UTC),
            boot_s=record.boot_s,
            cause=record.cause,
            checked=self.files.is_checked(record.key),
            instances=mapped.count(_inode(template.memory)),
        )

    async def remove(self, key: str) -> tuple[int, int]:
        return await self.files.remove(key)

    async def refresh(self, key: str, workplace: Workplace, card: Card) -> None:
        record = next((record for _, record in await in_thread(self.files.all) if record.key == key), None)
        if record is None:
            raise absent(key)
        machine = Machine(
            id=key,
            memory_mib=record.memory_mib,
            cpus=record.cpus,
            accelerator=record.accelerator,
            card=card,
            tty=record.tty,
            stdin=False,
            root_bytes=record.root_bytes,
            parts=(),
        )
        builder = await self._builder(workplace, machine, await self._boot.ensure())
        if builder.key != key:
            raise conflict(
                f"template {key} is of versions that this host does not have any more: no vm will go on from it",
                hint=f"alveole template rm {key}",
            )
        await self.files.refresh(key, builder.build)


def _versions_of(record: TemplateRecord) -> tuple[str, str, str]:
    return record.qemu, record.kernel, record.initramfs


def _inode(path: Path) -> tuple[int, int] | None:
    """What file it is, by whatever name. None if it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
