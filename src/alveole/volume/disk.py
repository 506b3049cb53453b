"""Volumes as disks: each an ext4 filesystem in a sparse raw file of the pool, mounted once on this node or a machine's.

ID.img is complete; ID.new was being made when somebody died. What is mounted is asked of the kernel, never remembered.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from alveole.host.blocking import in_thread
from alveole.host.identity import Identity
from alveole.host.loop import is_attached, is_locked, mount_image
from alveole.host.mount import ensure_shared, unmount
from alveole.host.mountinfo import is_mountpoint
from alveole.host.process import run
from alveole.model.error import AlveoleError, conflict, exhausted, internal, not_found
from alveole.model.volume import Volume
from alveole.volume.pool import Pool, rename_durably
from alveole.volume.root import RootDisks, copy_disk, undone

_MKFS_TIMEOUT_S = 120.0
_FSCK_TIMEOUT_S = 1800.0
_FSCK_REPAIRED = 2  # exit codes up to this: clean, or all faults repaired
_DETACH_WAIT_S = 2.0  # the last mount namespace that has a disk may still be ending
_DETACH_POLL_S = 0.02


class DiskVolumes:
    """The volume driver."""

    def __init__(self, identity: Identity, root: Path) -> None:
        """``root`` is where disks persist: state/volumes."""
        self._place = identity.run / "storage"
        self._mounts = self._place / "volumes"
        self._pool = Pool(root, self._place / "pool")
        self._roots = RootDisks(self._pool, self._open)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def create(self, volume: Volume) -> None:
        async with self._lock(volume.id):
            disks = await self._open()
            disk = disks / f"{volume.id}.img"
            if disk.exists():
                return
            await self._pool.ensure_room(volume.size_bytes, volume.name)
            new = disk.with_suffix(".new")
            try:
                await _make_filesystem(new, volume.size_bytes)
                await in_thread(partial(rename_durably, new, disk))
            except BaseException:
                new.unlink(missing_ok=True)
                raise

    async def ensure_mounted(self, volume: Volume) -> Path:
        """Where other users of this host cannot reach it. Raises NOT_FOUND if its disk is not here."""
        target = self._mounts / volume.id
        async with self._lock(volume.id):
            if is_mountpoint(target):
                return target
            disk = await self._find(volume)
            await _refuse_locked(disk, volume.name)
            if not await is_attached(disk):
                await _check(disk, volume.name)
            await mount_image(disk, target, "ext4", options="errors=remount-ro")
            return target

    async def ensure_disk(self, volume: Volume) -> Path:
        """Raises NOT_FOUND if it is not here."""
        async with self._lock(volume.id):
            if is_mountpoint(self._mounts / volume.id):
                raise conflict(
                    f"volume {volume.name} is mounted on this node for containers or sandboxes: no machine can have it",
                    hint="stop the instances that have it first",
                )
            disk = await self._find(volume)
            await _await_detached(disk, volume.name, "no machine can have it")
            await _refuse_locked(disk, volume.name)
            await _check(disk, volume.name)
            return disk

    async def _find(self, volume: Volume) -> Path:
        disk = await self._open() / f"{volume.id}.img"
        if not disk.exists():
            raise not_found(f"volume {volume.name} has no disk on this node", hint="remove it and make it again")
        return disk

    async def ensure_unmounted(self, volume_id: str) -> None:
        async with self._lock(volume_id):
            await self._unmount(volume_id)

    async def _unmount(self, volume_id: str) -> None:
        target = self._mounts / volume_id
        await unmount(target)
        if target.exists():
            target.rmdir()

    async def remove(self, volume_id: str) -> None:
        """If some mount namespace still holds it, its space is given back when that ends."""
        async with self._lock(volume_id):
            await self._unmount(volume_id)
            if not self._pool.exists():
                return
            disk = await self._open() / f"{volume_id}.img"
            disk.unlink(missing_ok=True)

    async def base_disk(self, key: str, make: Callable[[Path], Awaitable[None]], *, need_bytes: int = 0) -> Path:
        return await self._roots.base(key, make, need_bytes)

    async def root_disk(self, instance_id: str, base: Path) -> Path:
        return await self._roots.root(instance_id, base)

    async def copy_root_disk(self, source_id: str, instance_id: str, *, replace: bool = False) -> Path:
        return await self._roots.root(instance_id, await self._roots.path(source_id), replace=replace)

    async def keep_volume(self, volume_id: str, copy_id: str) -> None:
        async with self._lock(volume_id):
            target = self._mounts / volume_id
            if is_mountpoint(target):
                await run(["sync", "--file-system", str(target)], timeout_s=_FSCK_TIMEOUT_S)
            await self._roots.root(copy_id, await self._open() / f"{volume_id}.img")

    async def restore_volume(self, copy_id: str, volume: Volume) -> None:
        async with self._lock(volume.id):
            await self._unmount(volume.id)
            disk = await self._open() / f"{volume.id}.img"
            if disk.exists():
                await _await_detached(disk, volume.name, "its content cannot be replaced")
                await _refuse_locked(disk, volume.name)
            await self._pool.ensure_space(0, f"volume {volume.name}")
            new = disk.with_suffix(".new")
            with undone(new):
                await in_thread(partial(copy_disk, await self._roots.path(copy_id), new, disk))

    async def remove_root_disk(self, instance_id: str) -> None:
        await self._roots.remove(instance_id)

    async def collect_bases(self, used_keys: Collection[str]) -> int:
        return await self._roots.collect(used_keys)

    async def recover(self, volumes: Collection[Volume], instances: Collection[str]) -> None:
        known = {volume.id for volume in volumes}
        for mounted in _entries(self._mounts):
            if mounted.name not in known:
                await self.ensure_unmounted(mounted.name)
        if not self._pool.exists():
            return
        directory = await self._open()
        await self._roots.recover(directory, instances)
        for file in _entries(directory):
            if file.suffix == ".new":
                file.unlink()
            elif file.suffix == ".img" and file.stem not in known:
                await self.remove(file.stem)

    async def close(self) -> None:
        if any(is_mountpoint(target) for target in _entries(self._mounts)):
            return
        self._roots.tidy()
        await self._pool.ensure_closed()
        await unmount(self._place)
        for directory in (*_entries(self._mounts), self._mounts, self._place):
            if directory.exists():
                directory.rmdir()

    async def _open(self) -> Path:
        """The directory of the disks, all mounts being where they can be undone everywhere."""
        self._place.mkdir(parents=True, exist_ok=True, mode=0o700)
        await ensure_shared(self._place)
        return await self._pool.ensure_open()

    def _lock(self, volume_id: str) -> asyncio.Lock:
        return self._locks.setdefault(volume_id, asyncio.Lock())


async def _make_filesystem(file: Path, size_bytes: int) -> None:
    """An empty ext4, also without lost+found, as databases want their directory empty.

    A sparse file reads as zeros, so nothing needs to be zeroed, neither now nor later by the kernel.
    """
    with file.open("wb") as image:
        image.truncate(size_bytes)
    file.chmod(0o600)
    extended = "assume_storage_prezeroed=1,lazy_journal_init=1,nodiscard,root_owner=0:0"
    try:
        await run(["mkfs.ext4", "-q", "-F", "-m", "0", "-E", extended, str(file)], timeout_s=_MKFS_TIMEOUT_S)
        await run(["debugfs", "-w", "-R", "rmdir lost+found", str(file)], timeout_s=_MKFS_TIMEOUT_S)
    except AlveoleError as error:
        if "No space left" in error.message:
            raise exhausted(f"no space for a volume: the disk of {file.parent} is full", hint="free some") from error
        raise


async def _await_detached(disk: Path, name: str, so: str) -> None:
    """Raises CONFLICT if something of this host still has it mounted: a machine would be a second writer."""
    try:
        async with asyncio.timeout(_DETACH_WAIT_S):
            while await is_attached(disk):  # noqa: ASYNC110  (the kernel does not tell)
                await asyncio.sleep(_DETACH_POLL_S)
    except TimeoutError as error:
        raise conflict(
            f"volume {name} is still mounted in some mount namespace of this host: {so}",
            hint=f"end the processes that hold it: grep -l {disk.stem} /proc/[0-9]*/mountinfo",
        ) from error


async def _refuse_locked(disk: Path, name: str) -> None:
    """Whoever is thought to hold it: two writers would destroy its filesystem."""
    if await is_locked(disk):
        raise conflict(f"volume {name} is the disk of a machine that still runs", hint="stop that machine first")


async def _check(disk: Path, name: str) -> None:
    """Replay the journal and repair what is safe to repair; at once if it was unmounted cleanly."""
    result = await run(["e2fsck", "-p", str(disk)], timeout_s=_FSCK_TIMEOUT_S, check=False)
    if not 0 <= result.code <= _FSCK_REPAIRED:
        raise internal(
            f"the filesystem of volume {name} is damaged: {result.text.strip()[-300:]}",
            hint=f"keep a copy of {disk}, then repair it: e2fsck {disk}",
        )


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.exists() else []
