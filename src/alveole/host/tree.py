"""Copies of trees of files, made by children: they may take long."""

import sys
from pathlib import Path

from alveole.host import shift_ids
from alveole.host.process import run
from alveole.model.error import AlveoleError, exhausted

_TIMEOUT_S = 3600.0


async def copy_tree(source: Path, target: Path, *, ids_base: int | None = None) -> None:
    """All of a tree, extended attributes, links and device nodes included; blocks are shared where the disk can.

    ``ids_base``: the range of ids that the copy's files shall have (see shift_ids). Raises EXHAUSTED on a full disk;
    what was copied is left then.
    """
    try:
        await run(["cp", "-a", "--reflink=auto", "--", str(source), str(target)], timeout_s=_TIMEOUT_S)
    except AlveoleError as error:
        if "No space left" in error.message or "quota exceeded" in error.message:
            raise exhausted(
                f"no space for a copy of {source.name}: the disk is full", hint="free some space"
            ) from error
        raise
    if ids_base is not None:
        child = [sys.executable, "-ISs", shift_ids.__file__]
        await run([*child, str(target), str(ids_base)], timeout_s=_TIMEOUT_S)
