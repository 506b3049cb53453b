"""Which disk a directory lies on, for I/O limits."""

import os
from pathlib import Path

import pytest

from alveole.host.disk import disk_of
from alveole.model.error import AlveoleError, ErrorCode


def _devices(root: Path, *, partition: bool) -> Path:
    """A /sys in which ``root`` is on a disk 8:0, or on a partition of it."""
    number = root.stat().st_dev
    disk = root / "sys/devices/sda"
    place = disk / "sda1" if partition else disk
    place.mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    if partition:
        (place / "partition").write_text("1\n")
        (place / "dev").write_text("8:1\n")
    links = root / "sys/dev"
    links.mkdir()
    (links / f"{os.major(number)}:{os.minor(number)}").symlink_to(place)
    return links


@pytest.mark.parametrize("partition", [False, True])
def test_a_partition_stands_for_its_disk(tmp_path: Path, partition: bool) -> None:
    assert disk_of(tmp_path, _devices(tmp_path, partition=partition)) == "8:0"


def test_a_filesystem_without_a_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AlveoleError, match="not on one disk") as refused:
        disk_of(tmp_path, tmp_path)
    assert refused.value.code is ErrorCode.UNSUPPORTED
