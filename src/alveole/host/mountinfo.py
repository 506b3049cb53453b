"""What is mounted in our mount namespace, read off /proc/self/mountinfo."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    id: int
    device: str  # "major:minor"
    root: str  # what of the filesystem is mounted
    target: str
    filesystem: str
    source: str
    options: frozenset[str]  # of the filesystem, for cgroup v1 the controllers


def parse_mountinfo(text: str) -> Iterator[MountEntry]:
    """In the order of mounting: later ones may cover earlier ones."""
    for line in _lines(text):
        left, _, right = line.partition(" - ")
        fields, (filesystem, source, options) = left.split(" "), right.split(" ", 2)
        yield MountEntry(
            id=int(fields[0]),
            device=fields[2],
            root=_unescape(fields[3]),
            target=_unescape(fields[4]),
            filesystem=filesystem,
            source=_unescape(source),
            options=frozenset(options.split(",")),
        )


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n")  # splitlines() would also split at odd characters within a path


def _unescape(field: str) -> str:
    """The kernel writes space, tab, newline and backslash as three octal digits."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), field) if "\\" in field else field


def mounts() -> list[MountEntry]:
    return list(parse_mountinfo(_read()))


def targets_below(directory: Path) -> list[Path]:
    """Mount points below ``directory``, itself included, latest first: the order in which to unmount."""
    prefix = f"{directory}/"
    fields = (line.split(" ", 5)[4] for line in _lines(_read()))  # much cheaper than parsing all of each line
    targets = [_unescape(field) for field in fields]
    return [Path(target) for target in reversed(targets) if target == str(directory) or target.startswith(prefix)]


def _read() -> str:
    return os.fsdecode(MOUNTINFO.read_bytes())


def mount_id(descriptor: int) -> int:
    """Of the mount that an open path lies on."""
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/fdinfo/{descriptor} has no mnt_id")


def is_mountpoint(path: Path) -> bool:
    """Also for a bind mount within one filesystem; a symbolic link is none. Costs the same however much is mounted."""
    try:
        return _mount_id_at(path, os.O_NOFOLLOW) != _mount_id_at(path.parent) or path == path.parent
    except FileNotFoundError:
        return False


def _mount_id_at(path: Path, flags: int = 0) -> int:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    try:
        return mount_id(descriptor)
    finally:
        os.close(descriptor)
