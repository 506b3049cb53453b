"""What an overlay's upper directory changes of its layers.

Run as a child: ``python -I -S upper_diff.py LIMIT UPPER LAYER...``, layers highest first. It prints one JSON array a
line: kind, path, mode, bytes, time of change in nanoseconds. Kinds are those of ``docker diff``: A added, C changed, D
deleted. At most LIMIT lines; then a last line, ``null``.

How an upper directory says that something of its layers is gone: Documentation/filesystems/overlayfs.rst, "whiteouts
and opaque directories".
"""

import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress

_OPAQUE = "user.overlay.opaque"  # as overlays of this host are mounted with userxattr
Change = tuple[str, str, int, int, int]


def changes(upper: str, layers: list[str]) -> Iterator[Change]:
    """Directories before what is in them, names in order."""
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        below = []
        names = set()
        for name in sorted(_names(upper + directory)):
            path = f"{directory}/{name}"
            names.add(name)
            with suppress(OSError):  # the instance may go on writing, or have a name too long to be reached
                yield (change := _change(upper, path, layers))
                if stat.S_ISDIR(change[2]):
                    below.append(path)
        if directory and _is_opaque(upper + directory):
            yield from _hidden(directory, names, layers)
        waiting += reversed(below)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208  (a Path for each would double the time)
    except OSError:  # gone since, no directory, or deeper than a path can be long
        return []


def _change(upper: str, path: str, layers: list[str]) -> Change:
    status = os.lstat(upper + path)
    if _is_whiteout(status):
        return "D", path, 0, 0, status.st_mtime_ns
    kind = "C" if _exists(path, layers) else "A"
    return kind, path, status.st_mode, status.st_size if stat.S_ISREG(status.st_mode) else 0, status.st_mtime_ns


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(directory: str) -> bool:
    try:
        return os.getxattr(directory, _OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def _hidden(directory: str, names: set[str], layers: list[str]) -> Iterator[Change]:
    """What the layers have in a directory that was removed and made again."""
    below = {name for layer in layers for name in _names(layer + directory)}
    for name in sorted(below - names):
        if _exists(f"{directory}/{name}", layers):
            yield "D", f"{directory}/{name}", 0, 0, 0


def _exists(path: str, layers: list[str]) -> bool:
    """Whether the layers together have it."""
    for layer in layers:
        reached = _reach(path, layer)
        if reached is not None:
            return reached
    return False


def _reach(path: str, layer: str) -> bool | None:
    """Whether it is there, as this layer has it; None: it says nothing, so that those below decide."""
    place, opaque = layer, False
    for part in path[1:].split("/"):
        place = f"{place}/{part}"
        try:
            status = os.lstat(place)
        except OSError:
            return False if opaque else None
        if _is_whiteout(status):
            return False
        if not stat.S_ISDIR(status.st_mode):
            return place == layer + path
        opaque = opaque or _is_opaque(place)
    return True


def main(limit: int, upper: str, layers: list[str]) -> None:
    for number, (kind, path, *rest) in enumerate(changes(upper, layers)):
        if number == limit:
            print("null")
            return
        name = os.fsencode(path).decode(errors="replace")
        print(json.dumps([kind, name, *rest]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
