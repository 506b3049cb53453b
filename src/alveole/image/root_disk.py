"""Root disks of machines: an ext4 filesystem in a raw sparse file, with what the layers of an image hold together."""

import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path

from alveole.host.blocking import in_thread
from alveole.host.process import Result, run
from alveole.image.root_disk_child import Survey
from alveole.model.error import AlveoleError, exhausted, internal

_TIMEOUT_S = 3600.0
"""Beyond what any image takes, only a disk that hangs takes so long."""

_TOO_SMALL = ("Could not allocate", "requested number of inodes")  # mke2fs, of the filesystem being made
_NO_SPACE = "No space left on device"


async def make_root_disk(layers: tuple[Path, ...], target: Path, size_bytes: int) -> None:
    """Make the disk ``target`` of ``layers`` (unpacked, ids as in the image, with whiteouts; lowest first).

    It is complete and on disk when this returns; on failure there is none. Killed at any time, it may be left half
    made, and nothing mounted. What is in ``target`` before is lost.

    Raises EXHAUSTED if the content does not fit in ``size_bytes``, or the filesystem of ``target`` is full.
    """
    try:
        await in_thread(partial(_make_sparse, target, size_bytes))
        survey = await _fill(layers, target, size_bytes)
        await _finish(target, survey)
        await in_thread(partial(_sync, target))
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _make_sparse(target: Path, size_bytes: int) -> None:
    target.unlink(missing_ok=True)
    with target.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size_bytes)


async def _fill(layers: tuple[Path, ...], target: Path, size_bytes: int) -> Survey:
    child = [sys.executable, "-I", "-m", "alveole.image.root_disk_child"]
    arguments = [str(os.getpid()), str(target), str(size_bytes), *map(str, layers)]
    # slave: what the host unmounts meanwhile must end here too
    argv = ["unshare", "--mount", "--propagation", "slave", *child, *arguments]
    result = await run(argv, timeout_s=_TIMEOUT_S, check=False)
    survey = _read(result)
    if not survey.fits or any(words in result.stderr.decode(errors="replace") for words in _TOO_SMALL):
        raise exhausted(
            f"the image does not fit on its root disk: it holds {_mib(survey.content_bytes)} MiB in "
            f"{survey.inodes} files, the disk {_mib(size_bytes)} MiB",
            hint="make the root disk larger",
        )
    if result.code != 0:
        raise _failure(result, target)
    return survey


def _read(result: Result) -> Survey:
    """Raises INTERNAL if the child did not come as far as to say what it found."""
    try:
        return Survey(**json.loads(result.text.splitlines()[0]))
    except (IndexError, ValueError) as error:
        raise result.failure() from error


async def _finish(target: Path, survey: Survey) -> None:
    """What mke2fs does otherwise than the image: the root directory's mode, and a lost+found."""
    commands = [f"set_inode_field / mode 0{0o40000 | survey.mode:o}"]
    if not survey.lost_and_found:
        commands.append("rmdir lost+found")
    argv = ["debugfs", "-w", "-f", "-", str(target)]
    result = await run(argv, timeout_s=_TIMEOUT_S, stdin="\n".join(commands).encode(), check=False)
    words = result.stderr.decode(errors="replace").partition("\n")[2].strip()  # the first line names its version
    if result.code != 0 or words:
        raise _failure(result, target)


def _failure(result: Result, target: Path) -> AlveoleError:
    words = result.stderr.decode(errors="replace").strip()
    if _NO_SPACE in words:
        return exhausted(f"no space for a root disk: the disk of {target.parent} is full", hint="free some space on it")
    told = words[-300:] or f"it ended with {result.code}"
    return internal(f"the root disk cannot be made: {told}", hint=f"to replay: {shlex.join(result.argv)}")


def _sync(target: Path) -> None:
    descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(size_bytes: int) -> int:
    return -(-size_bytes >> 20)
