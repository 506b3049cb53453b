"""Root disks of machines, in the pool: ``base/KEY.img`` one for each image, ``roots/ID.img`` one for each instance.

An instance's is a reflink of its image's base, its own from the first write on. ``.new`` files were being made when
somebody died.
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from alveole.host.blocking import in_thread
from alveole.model.error import exhausted, not_found
from alveole.volume.pool import Pool, clone, rename_durably

_BASES, _ROOTS = "base", "roots"


class RootDisks:
    def __init__(self, pool: Pool, open_pool: Callable[[], Awaitable[Path]]) -> None:
        """``open_pool`` makes the pool where missing, and says where it is."""
        self._pool = pool
        self._open = open_pool
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def base(self, key: str, make: Callable[[Path], Awaitable[None]], need_bytes: int) -> Path:
        async with self._lock(key):
            disk = await self._open() / _BASES / f"{key}.img"
            if disk.exists():
                return disk
            await self._pool.ensure_space(need_bytes, "the root disk of an image")
            new = disk.with_suffix(".new")
            with undone(new):
                disk.parent.mkdir(mode=0o700, exist_ok=True)
                await make(new)
                await in_thread(partial(rename_durably, new, disk))
        return disk

    async def root(self, instance_id: str, base: Path, *, replace: bool = False) -> Path:
        async with self._lock(instance_id):
            disk = await self.path(instance_id)
            if disk.exists() and not replace:
                return disk
            await self._pool.ensure_space(0, "the root disk of an instance")
            new = disk.with_suffix(".new")
            with undone(new):
                disk.parent.mkdir(mode=0o700, exist_ok=True)
                await in_thread(partial(copy_disk, base, new, disk))
        return disk

    async def path(self, instance_id: str) -> Path:
        return await self._open() / _ROOTS / f"{instance_id}.img"

    async def remove(self, instance_id: str) -> None:
        if not self._pool.exists():
            return
        async with self._lock(instance_id):
            disk = await self.path(instance_id)
            if disk.exists():
                await in_thread(partial(disk.unlink, missing_ok=True))

    async def collect(self, used_keys: Collection[str]) -> int:
        if not self._pool.exists():
            return 0
        freed = 0
        for disk in _disks(await self._open() / _BASES, ".img"):
            if disk.stem not in used_keys:
                async with self._lock(disk.stem):
                    freed += await in_thread(partial(_remove, disk))
        return freed

    async def recover(self, directory: Path, instances: Collection[str]) -> None:
        """To be called while nothing is being made. ``directory`` is the opened pool."""
        stale = [*_disks(directory / _BASES, ".new"), *_disks(directory / _ROOTS, ".new")]
        stale += [disk for disk in _disks(directory / _ROOTS, ".img") if disk.stem not in instances]
        for disk in stale:
            await in_thread(partial(_remove, disk))

    def tidy(self) -> None:
        """Remove the directories that hold nothing."""
        directory = self._pool.opened()
        if directory is None:
            return
        for name in (_BASES, _ROOTS):
            with suppress(OSError):  # not there, or not empty
                (directory / name).rmdir()

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


@contextmanager
def undone(new: Path) -> Iterator[None]:
    """On failure, leave nothing of ``new``, and tell of a full pool as such."""
    try:
        yield
    except BaseException as error:
        with suppress(FileNotFoundError):
            new.unlink()
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise exhausted(f"no space for a root disk: {new.parent.parent} is full", hint="free some space") from error
        raise


def copy_disk(base: Path, new: Path, disk: Path) -> None:
    """By way of ``new``. No sync: the copy is in the filesystem's journal before its name is, its blocks on disk."""
    try:
        source = base.open("rb")
    except FileNotFoundError as error:
        raise not_found(f"disk {base.stem} is not there (any more)", hint="start the instance again") from error
    with source, new.open("wb") as copy:
        os.fchmod(copy.fileno(), 0o600)
        clone(source, copy)
    new.rename(disk)


def _disks(directory: Path, suffix: str) -> list[Path]:
    return [entry for entry in directory.iterdir() if entry.suffix == suffix] if directory.exists() else []


def _remove(disk: Path) -> int:
    """Bytes it took."""
    try:
        taken = disk.stat().st_blocks * 512
        disk.unlink()
    except FileNotFoundError:
        return 0
    return taken
