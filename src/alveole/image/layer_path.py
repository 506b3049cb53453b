"""Where a path leads in stacked layers: the symbolic links of an image are followed inside it, never on the host."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

_LINKS_LIMIT = 40  # as the kernel's


def resolve(target: str, layers: Sequence[Path], *, last: bool) -> str:
    """``target`` without symbolic links in its directories (and in its ``last`` part), relative to the root.

    ``layers`` are unpacked, lowest first. What does not exist leads to itself. Raises OSError(ELOOP) on a loop.
    """
    pending = [part for part in reversed(target.split("/")) if part]
    done: list[str] = []
    links = 0
    while pending:
        part = pending.pop()
        if part in {".", ".."}:
            done = done[:-1] if part == ".." else done
            continue
        link = _link([*done, part], layers) if pending or last else ""
        if not link:
            done.append(part)
            continue
        links += 1
        if links > _LINKS_LIMIT:
            raise OSError(40, "too many symbolic links", target)
        done = [] if link.startswith("/") else done
        pending += [step for step in reversed(link.split("/")) if step]
    return "/".join(done)


def _link(parts: Sequence[str], layers: Sequence[Path]) -> str:
    """What the symbolic link at this path says; empty if none is there. No part before the last is a link above."""
    for layer in reversed(layers):
        directory = os.open(layer, os.O_PATH | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                below = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
                os.close(directory)
                directory = below
                if not stat.S_ISDIR(os.fstat(directory).st_mode):
                    return ""
            found = os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
            return os.readlink(parts[-1], dir_fd=directory) if stat.S_ISLNK(found.st_mode) else ""
        except FileNotFoundError:
            continue  # this layer says nothing of the path
        finally:
            os.close(directory)
    return ""
