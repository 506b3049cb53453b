"""Reading /proc/self/mountinfo: names that users choose must not confuse it."""

import os
from pathlib import Path

import pytest

from alveole.host import mountinfo
from alveole.host.mountinfo import is_mountpoint, mount_id, parse_mountinfo, targets_below

TEXT = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard
40 27 7:0 /sub\040dir /run/a\040b\134c ro,nosuid - xfs /dev/loop0 rw,attr2
41 27 0:50 / /run/ab rw - tmpfs tmpfs rw
42 27 0:51 / /run/ab/deep rw - tmpfs tmpfs rw
43 42 0:52 / /run/ab/deep rw - overlay overlay rw,lowerdir=/x:/y
"""


def test_fields_are_taken_apart_whatever_optional_ones_lie_between() -> None:
    entries = {entry.id: entry for entry in parse_mountinfo(TEXT)}
    assert entries[27].filesystem == "ext4"
    assert entries[27].device == "254:0"
    assert entries[40].target == r"/run/a b\c"
    assert entries[40].root == "/sub dir"
    assert entries[43].options == {"rw", "lowerdir=/x:/y"}


def test_a_path_with_a_line_separator_of_unicode_is_one_line() -> None:
    odd = "/run/a\u2028b\x0bc"
    [entry] = parse_mountinfo(f"1 2 0:1 / {odd} rw - tmpfs tmpfs rw\n")
    assert entry.target == odd


def test_targets_below_come_latest_first_and_without_neighbours_of_similar_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = tmp_path / "mountinfo"
    captured.write_text(TEXT)
    monkeypatch.setattr(mountinfo, "MOUNTINFO", captured)
    assert targets_below(Path("/run/ab")) == [Path("/run/ab/deep"), Path("/run/ab/deep"), Path("/run/ab")]
    assert targets_below(Path(r"/run/a b\c")) == [Path(r"/run/a b\c")]
    assert targets_below(Path("/run/a")) == []


def test_mount_points_are_told_from_directories_and_links(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/proc")
    assert is_mountpoint(Path("/proc"))
    assert is_mountpoint(Path("/"))
    assert not is_mountpoint(link)
    assert not is_mountpoint(tmp_path)
    assert not is_mountpoint(tmp_path / "missing")


def test_a_directory_reached_through_a_link_is_no_mount_point(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert not is_mountpoint(tmp_path / "link" / "self")


def test_mount_id_is_the_one_in_mountinfo() -> None:
    descriptor = os.open("/proc", os.O_PATH)
    try:
        number = mount_id(descriptor)
    finally:
        os.close(descriptor)
    assert next(entry for entry in mountinfo.mounts() if entry.id == number).filesystem == "proc"
