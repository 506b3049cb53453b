"""Where the disks of volumes lie: a directory whose filesystem has reflink.

That is the state directory itself where it is on XFS or btrfs, else the inside of a sparse XFS file made there.
"""

import asyncio
import fcntl
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import IO

from alveole.host.blocking import in_thread
from alveole.host.loop import grow_device, mount_image
from alveole.host.mount import unmount
from alveole.host.mountinfo import is_mountpoint
from alveole.host.process import run
from alveole.model.error import exhausted

_MIN_FILE_BYTES = 1 << 30
_RESERVE_BYTES = 64 << 20  # left free on the disk, as a write that finds none would fail in every volume at once
_FICLONE = 0x40049409
_MKFS_TIMEOUT_S = 300.0


def file_size(capacity_bytes: int) -> int:
    """How large to make the pool file on a disk that can give it ``capacity_bytes``: all, in whole MiB."""
    return max(_MIN_FILE_BYTES, capacity_bytes >> 20 << 20)


class Pool:
    def __init__(self, root: Path, mountpoint: Path) -> None:
        """``root`` persists; ``mountpoint`` is used only if a pool file is needed."""
        self._root = root
        self._file = root / "pool.xfs"
        self._mountpoint = mountpoint
        self._lock = asyncio.Lock()

    def exists(self) -> bool:
        """Whether a volume was ever made here."""
        return self._root.exists() and any(self._root.iterdir())

    def opened(self) -> Path | None:
        """The directory that holds the disks, if it can be reached now."""
        if self._file.exists():
            return self._mountpoint if is_mountpoint(self._mountpoint) else None
        return self._root if self._root.exists() else None

    async def ensure_open(self) -> Path:
        """The directory that holds the disks."""
        async with self._lock:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._file.exists():
                if _has_reflink(self._root):
                    return self._root
                await self._make_file()
            await mount_image(self._file, self._mountpoint, "xfs", options="discard")
            return self._mountpoint

    async def _make_file(self) -> None:
        self._require_space("the pool of volumes")
        new = self._file.with_suffix(".new")
        try:
            with new.open("wb") as file:
                file.truncate(file_size(self._capacity_bytes()))
            new.chmod(0o600)
            await run(["mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1", str(new)], timeout_s=_MKFS_TIMEOUT_S)
            await in_thread(partial(rename_durably, new, self._file))
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    async def ensure_room(self, size_bytes: int, name: str) -> None:
        """Raise EXHAUSTED if a disk of ``size_bytes`` could never be filled here, or the disk is full already.

        Disks take space as they are written, so together they may promise more than there is.
        """
        directory = await self.ensure_open()
        capacity = self._capacity_bytes()
        if size_bytes > capacity:
            raise exhausted(
                f"volume {name} of {size_bytes >> 20} MiB does not fit: the disk of {self._root} has room for "
                f"{capacity >> 20} MiB of volumes",
                hint="make it smaller, or the disk larger",
            )
        self._require_space(f"volume {name}")
        await self._ensure_free(directory, size_bytes)

    async def ensure_space(self, size_bytes: int, what: str) -> None:
        """Raise EXHAUSTED unless ``size_bytes`` can be written here now; ``what`` they are for is told."""
        directory = await self.ensure_open()
        self._require_space(what, size_bytes)
        await self._ensure_free(directory, size_bytes)

    async def _ensure_free(self, directory: Path, size_bytes: int) -> None:
        """Grow the pool file if that little is free in it."""
        if directory == self._mountpoint and _available_bytes(directory) < size_bytes + _RESERVE_BYTES:
            await self._grow()

    async def _grow(self) -> None:
        """To what the disk can give now; nothing if that is no more than it has."""
        async with self._lock:
            wanted = file_size(self._capacity_bytes())
            if wanted <= self._file.stat().st_size:
                return
            os.truncate(self._file, wanted)
            await grow_device(self._mountpoint)
            await run(["xfs_growfs", "-d", str(self._mountpoint)], timeout_s=_MKFS_TIMEOUT_S)

    def _require_space(self, what: str, size_bytes: int = 0) -> None:
        if _available_bytes(self._root) < size_bytes + _RESERVE_BYTES:
            raise exhausted(f"no space for {what}: the disk of {self._root} is full", hint="free some space on it")

    def _capacity_bytes(self) -> int:
        """What all volumes together can take: what they take now, and what is free."""
        taken = sum(entry.stat().st_blocks * 512 for entry in os.scandir(self._root))
        return taken + max(0, _available_bytes(self._root) - _RESERVE_BYTES)

    async def ensure_closed(self) -> None:
        """Unmount the pool file. Disks still in use elsewhere keep it until they are not."""
        async with self._lock:
            await unmount(self._mountpoint)
            if self._mountpoint.exists():
                self._mountpoint.rmdir()


def _available_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def rename_durably(new: Path, final: Path) -> None:
    """So that after a power cut either name holds the whole file."""
    new.rename(final)
    directory = os.open(final.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def clone(source: IO[bytes], copy: IO[bytes]) -> None:
    """Let ``copy`` share all blocks of ``source`` until either is written to. Raises OSError without reflink."""
    fcntl.ioctl(copy, _FICLONE, source.fileno())


def _has_reflink(directory: Path) -> bool:
    """Measured, as neither a filesystem's name nor its version tells."""
    with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as copy:
        source.write(bytes(4096))
        source.flush()
        try:
            clone(source, copy)
        except OSError:
            return False
        return True
