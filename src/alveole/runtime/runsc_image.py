"""What a captured sandbox is on disk: the files that its kernel wrote, and what must be known of it beside them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from alveole.model.base import Record

STATE = "checkpoint.img"
ABOUT = "about.json"
# An open file that is the host's: the name of the container it came with, something between, and which of its files.
_HOST_FILE = re.compile(rb"host:\d")
_OWNER = re.compile(rb"__no_name_\d+(.{1,32})\Z", re.DOTALL)
_BEFORE_BYTES = 64
_PIECE_BYTES = 2 << 20  # looked through at once: others wait for that long


class About(Record):
    """What is kept of a captured sandbox beside what its kernel wrote."""

    engine: str  # what wrote it: no other reads it
    hostname: str
    addresses: tuple[str, ...]  # that its programs may be bound to
    tty: bool
    binds: tuple[str, ...]  # where something of the host's is bound; the clone has something there too


def is_there(directory: Path) -> bool:
    return (directory / ABOUT).exists()


def about(directory: Path) -> About:
    return About.from_json((directory / ABOUT).read_bytes())


def has_strangers(state: bytes) -> bool:
    """Whether a file is open in it that came with a command run by ``exec``: nothing can stand for that in a clone.

    Such a file belongs to no container. Where a kernel writes its state in another way than is known, there are none.
    """
    found = [state[max(0, place - _BEFORE_BYTES) : place] for place in _host_files(state)]
    own = [owner[1] for before in found if (owner := _OWNER.search(before))]
    return any(before.endswith(tuple(set(own))) for before in found if not _OWNER.search(before))


def _host_files(state: bytes) -> Iterator[int]:
    for begin in range(0, len(state), _PIECE_BYTES):
        for match in _HOST_FILE.finditer(state, begin, begin + _PIECE_BYTES + len("host:")):
            yield match.start()


def sync(directory: Path) -> None:
    """So that a power cut may follow."""
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def size_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def room_bytes(directory: Path) -> int:
    """That its disk has left."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize


def empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


def link_all(source: Path, target: Path) -> None:
    """What is shared is not copied."""
    target.mkdir(mode=0o700)
    for file in source.iterdir():
        (target / file.name).hardlink_to(file)


def forget(directory: Path) -> None:
    """What tells that it is there goes last."""
    for file in directory.iterdir():
        if file.name != ABOUT:
            file.unlink()
    (directory / ABOUT).unlink()
    directory.rmdir()
