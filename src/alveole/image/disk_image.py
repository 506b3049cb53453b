"""Disk images of whole operating systems: checked, and made raw and sparse. Formats are given, never probed."""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from alveole.host import process
from alveole.host.blocking import in_thread
from alveole.image.base import Progress
from alveole.image.disk_image_child import CPU_S, EXIT_KILLED
from alveole.image.qcow2 import HEAD_BYTES, check_qcow2, check_raw
from alveole.model.error import AlveoleError, internal, invalid, unsupported
from alveole.model.image import DiskFormat

NOBODY = 65534

_CHECKS = {"qcow2": check_qcow2, "raw": check_raw}
_TIMEOUT_S = 3600.0
_PROGRESS_EVERY_S = 0.5
_NAMESPACES = ("--mount", "--propagation=slave", "--pid", "--fork", "--kill-child=KILL", "--net", "--ipc", "--uts")
_PIECE_BYTES = 4 << 20
_NO_SPACE = "No space left on device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A disk image that was given: a copy that nobody else writes to, checked."""

    what: str  # its name, for the user
    format: DiskFormat
    copy: Path
    digest: str  # "sha256:...", of the file as it was given
    virtual_bytes: int  # in whole sectors


async def take_copy(path: Path, format: DiskFormat, directory: Path, progress: Progress) -> Source:  # noqa: A002
    """Copy ``path`` into ``directory``, the caller's own. Raises INVALID if it is no such disk image."""
    what, copy = str(path), directory / "disk-source"
    if format == "qcow2" and not shutil.which("qemu-img", path=process.BASE_ENVIRONMENT["PATH"]):
        raise unsupported("program qemu-img is not installed", hint="install Debian's package qemu-utils")
    await in_thread(partial(_check, path, format, what))  # early: what is refused is not worth copying
    async with _telling(progress, f"copying {what}", copy):
        sparse = "--sparse=always" if format == "raw" else "--reflink=auto"
        await process.run(["cp", sparse, "--", str(path), str(copy)], timeout_s=_TIMEOUT_S)
    virtual_bytes = await in_thread(partial(_check, copy, format, what))  # the file may have changed since
    digest = await _digest(copy, what, progress)
    return Source(what=what, format=format, copy=copy, digest=digest, virtual_bytes=virtual_bytes)


async def make_raw(source: Source, user: int, progress: Progress) -> Path:
    """A raw and sparse file with the content of the disk, beside the copy, which is used up for it.

    What reads a qcow2 image runs as the host's user id ``user``. Raises INVALID if the image is damaged.
    """
    raw = source.copy.with_name("disk-raw")
    if source.format == "raw":
        source.copy.rename(raw)
    else:
        async with _telling(progress, f"converting {source.what}", raw):
            await _convert(source, raw, user)
        source.copy.unlink()
    raw.chmod(0o600)
    return raw


def _check(file: Path, format: DiskFormat, what: str) -> int:  # noqa: A002
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
        return _CHECKS[format](head, os.fstat(opened.fileno()).st_size, what)


async def _digest(copy: Path, what: str, progress: Progress) -> str:
    """Four times as fast as sha256sum, and disks are large."""
    digest = sha256()
    with copy.open("rb") as file:

        def feed() -> bool:
            data = file.read(_PIECE_BYTES)
            digest.update(data)
            return bool(data)

        while await in_thread(feed):  # in pieces, so that a cancel does not wait for long
            progress(f"computing the digest of {what}: {file.tell() / 1e6:.0f} MB")
    return f"sha256:{digest.hexdigest()}"


async def _convert(source: Source, raw: Path, user: int) -> None:
    """These modes let in nobody but the one who is shown the files: their directory is root's alone."""
    source.copy.chmod(0o444)
    raw.touch()
    raw.chmod(0o666)
    child = [sys.executable, "-I", "-m", "alveole.image.disk_image_child"]
    arguments = [str(source.copy), str(raw), str(source.virtual_bytes), str(user)]
    argv = ["setpriv", "--pdeathsig=KILL", "unshare", *_NAMESPACES, *child, *arguments]
    result = await process.run(argv, timeout_s=_TIMEOUT_S, check=False)
    if result.code != 0:
        raise _failure(result, source.what)
    if raw.stat().st_size != source.virtual_bytes:
        raise internal(f"qemu-img made a disk of {raw.stat().st_size} bytes of {source.what}, whose header says other")


def _failure(result: process.Result, what: str) -> AlveoleError:
    words = result.stderr.decode(errors="replace").strip()
    if result.code == EXIT_KILLED:
        if words == signal.SIGXCPU.name:
            words = f"it takes more than {CPU_S} s of processor time"
        elif words == signal.SIGKILL.name:
            return internal(f"converting {what} was ended by {words}", hint="look for lack of memory, then retry")
    elif _NO_SPACE in words or "qemu-img:" not in words:
        return result.failure()
    told = "; ".join(words.replace("qemu-img: ", "").replace("'/source'", "it").splitlines())[-300:]
    return invalid(f"{what} cannot be converted: {told}", hint="on a machine that trusts it: qemu-img check FILE")


@asynccontextmanager
async def _telling(progress: Progress, doing: str, file: Path) -> AsyncIterator[None]:
    """Meanwhile, tell how much of ``file`` is written."""

    async def tell() -> None:
        while True:
            await asyncio.sleep(_PROGRESS_EVERY_S)
            if file.exists():
                progress(f"{doing}: {written_bytes(file) / 1e6:.0f} MB")

    progress(doing)
    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.wait({telling})


def written_bytes(file: Path) -> int:
    """What a sparse file takes on its disk."""
    return file.stat().st_blocks * 512
