"""A disk that boots, made of a tree that holds a Debian system: GRUB before one partition, which holds an ext4.

No program of the tree runs here, and nothing is mounted from the disk: mke2fs fills the file system as it makes it, and
GRUB's two parts, which the tree brings along, need no block lists when the second directly follows the first.
"""

import os
import struct
from functools import partial
from pathlib import Path

from alveole.host.blocking import in_thread
from alveole.host.inside import read_inside
from alveole.host.process import run
from alveole.image.qcow2 import SECTOR_BYTES
from alveole.image.system_script import CORE_IMAGE, LABEL
from alveole.model.error import invalid

FIRST_BYTES = 1 << 20
"""Where the partition begins, as everywhere."""

_BOOT_BYTES = 440  # GRUB's part of the first sector; the rest is the disk's id, the table and the signature
_SIGNATURE = b"\x55\xaa"
_LINUX = 0x83
_ACTIVE = 0x80
_BEYOND_CHS = b"\xfe\xff\xff"  # "see the sector numbers"
_BOOT_IMAGE = "/usr/lib/grub/i386-pc/boot.img"
_MOUNT_POINTS = ("dev", "proc", "sys", "run", "tmp")
_FEATURES = "^metadata_csum_seed,^orphan_file"  # older systems and GRUB know neither
_TIMEOUT_S = 1800.0


async def make_disk(tree: Path, size_mib: int, output: Path) -> None:
    """Write the raw and sparse disk ``output``. Raises INVALID if the tree does not fit, or has lost its boot loader.

    ``tree`` is a writable copy that nobody else uses.
    """
    start = await in_thread(partial(_start, tree, size_mib))
    await in_thread(partial(_prepare, tree, output, size_mib))
    layout = ("-E", f"offset={FIRST_BYTES},nodiscard,root_owner=0:0", "-O", _FEATURES, "-m", "1")
    partition_mib = size_mib - FIRST_BYTES // (1 << 20)
    argv = ("mke2fs", "-q", "-F", "-t", "ext4", *layout, "-L", LABEL, "-d", str(tree))
    result = await run(
        ("setpriv", "--pdeathsig=KILL", *argv, str(output), f"{partition_mib}m"), timeout_s=_TIMEOUT_S, check=False
    )
    if result.code != 0:
        words = result.stderr.decode(errors="replace")
        if "Could not allocate" in words:
            raise invalid(f"the system does not fit in {size_mib} MiB", hint="make it larger", field="disk_mib")
        raise result.failure()
    await in_thread(partial(_write_start, output, start))


def boot_area(boot: bytes, core: bytes, *, size_bytes: int, disk_id: bytes) -> bytes:
    """What comes before the partition: boot sector with a partition table, then GRUB's core, which it looks for there.

    Raises INVALID if these are no such parts.
    """
    if len(boot) != SECTOR_BYTES or not boot.endswith(_SIGNATURE):
        raise invalid(f"{_BOOT_IMAGE} of the system is no boot sector", hint="leave package grub-pc-bin as it is")
    room = FIRST_BYTES - SECTOR_BYTES
    if not 0 < len(core) <= room:
        raise invalid(
            f"{CORE_IMAGE} of the system has {len(core)} bytes, and there is room for 1 to {room}",
            hint="leave package grub-pc-bin as it is",
        )
    first, sectors = FIRST_BYTES // SECTOR_BYTES, (size_bytes - FIRST_BYTES) // SECTOR_BYTES
    partition = struct.pack("<B3sB3sII", _ACTIVE, _BEYOND_CHS, _LINUX, _BEYOND_CHS, first, sectors)
    table = partition.ljust(4 * len(partition), b"\0")
    return boot[:_BOOT_BYTES] + disk_id + bytes(2) + table + _SIGNATURE + core


def _start(tree: Path, size_mib: int) -> bytes:
    parts = (read_inside(tree, path, FIRST_BYTES) or b"" for path in (_BOOT_IMAGE, CORE_IMAGE))
    return boot_area(*parts, size_bytes=size_mib << 20, disk_id=os.urandom(4))


def _prepare(tree: Path, output: Path, size_mib: int) -> None:
    """Layers hold no directories that every container is given anew; a system needs them."""
    for name in _MOUNT_POINTS:
        (tree / name).mkdir(exist_ok=True)
    output.touch(mode=0o600)  # there may be passwords in it
    with output.open("wb") as file:
        file.truncate(size_mib << 20)


def _write_start(output: Path, start: bytes) -> None:
    with output.open("r+b") as file:
        file.write(start)
