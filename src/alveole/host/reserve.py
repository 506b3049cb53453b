"""A file that holds space on a disk, to be given up when the disk is full.

On a full disk nothing could be removed any more, since even that must be written down first.
"""

import os
from contextlib import suppress
from pathlib import Path

from alveole.model.error import exhausted

RESERVE_BYTES = 16 << 20
_ROOM = 4  # it is made when so many times its size is free


class Reserve:
    """The methods do no more than a few system calls."""

    def __init__(self, path: Path, size_bytes: int = RESERVE_BYTES) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def ensure(self) -> None:
        """Take the space, if there is plenty. Called at the start and every few seconds."""
        if self._path.exists():
            return
        disk = os.statvfs(self._path.parent)
        if disk.f_bavail * disk.f_frsize < _ROOM * self._size_bytes:
            return
        temporary = self._path.with_suffix(".new")
        try:
            with temporary.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size_bytes)
            temporary.rename(self._path)
        except OSError:  # another writer was quicker: the next call tries again
            temporary.unlink(missing_ok=True)

    def require(self) -> None:
        """Raises EXHAUSTED while the space has been given up, for what would use up more of the disk."""
        disk = os.statvfs(self._path.parent)
        if not self._path.exists() and disk.f_bavail * disk.f_frsize < _ROOM * self._size_bytes:
            raise exhausted(
                f"the disk of {self._path.parent} is full", hint="remove instances, volumes or images, or add space"
            )

    def release(self) -> bool:
        """Give the space up. False if it was not held."""
        with suppress(FileNotFoundError):
            self._path.unlink()
            return True
        return False
