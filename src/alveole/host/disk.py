"""Which disk a directory lies on."""

import os
from pathlib import Path

from alveole.model.error import unsupported

_BLOCK_DEVICES = Path("/sys/dev/block")


def disk_of(path: Path, devices: Path = _BLOCK_DEVICES) -> str:
    """``major:minor`` of the whole disk under ``path``: the kernel limits the rate of disks, not of partitions.

    Raises UNSUPPORTED if its filesystem is on no disk of its own (tmpfs, btrfs, overlay, network).
    """
    number = path.stat().st_dev
    device = devices / f"{os.major(number)}:{os.minor(number)}"
    if not device.exists():
        raise unsupported(
            f"the filesystem of {path} is not on one disk, so I/O limits cannot be set",
            hint="put the state directory on ext4 or XFS, or leave out --io-read-bps and --io-write-bps",
        )
    place = device.resolve()
    return ((place.parent if (place / "partition").exists() else place) / "dev").read_text().strip()
