"""Copies of trees with other ids, and what an overlay's upper directory tells, on the real kernel."""

import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from alveole.host import mount, shift_ids, upper_diff
from alveole.host.tree import copy_tree
from alveole.model.error import AlveoleError, ErrorCode

pytestmark = pytest.mark.root
OLD, NEW = 1 << 28, (1 << 28) + (1 << 16)


def capability(root: int) -> bytes:
    """CAP_NET_RAW, effective, of the namespace whose root has this id."""
    return struct.pack("<IIIIII", 0x03000001, 1 << 13, 0, 0, 0, root)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "upper"
    (top / "deep").mkdir(parents=True)
    (top / "deep/su").write_bytes(b"x")
    (top / "deep/hard").hardlink_to(top / "deep/su")
    (top / "ping").write_bytes(b"y")
    (top / "away").symlink_to("/nowhere")
    (top / "todir").symlink_to("deep")
    (top / "foreign").write_bytes(b"z")
    os.mkfifo(top / "pipe")
    os.mknod(top / "gone", stat.S_IFCHR, 0)
    for path in (top / "deep/su", top / "ping", top / "away", top / "todir", top / "pipe", top / "deep"):
        os.lchown(path, OLD + 1000, OLD + 5)
    (top / "deep/su").chmod(0o6755)
    os.setxattr(top / "ping", "security.capability", capability(OLD))
    os.setxattr(top / "deep", "user.overlay.opaque", b"y")
    os.chown(top, OLD, OLD)
    return top


async def test_a_copy_has_the_ids_it_is_given_and_all_else_of_the_original(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    await copy_tree(tree, copy, ids_base=NEW)
    assert copy.stat().st_uid == NEW
    for name in ("deep/su", "ping", "away", "todir", "pipe", "deep"):
        status = (copy / name).lstat()
        assert (status.st_uid, status.st_gid) == (NEW + 1000, NEW + 5), name
    assert stat.S_IMODE((copy / "deep/su").stat().st_mode) == 0o6755
    assert (copy / "deep/hard").samefile(copy / "deep/su")
    assert os.getxattr(copy / "ping", "security.capability") == capability(NEW)
    assert os.getxattr(copy / "deep", "user.overlay.opaque") == b"y"
    assert (copy / "foreign").stat().st_uid == 0
    assert (copy / "gone").lstat().st_rdev == 0
    assert stat.S_ISCHR((copy / "gone").lstat().st_mode)
    assert str((copy / "away").readlink()) == "/nowhere"
    assert (tree / "ping").stat().st_uid == OLD + 1000
    shift_ids.shift(str(copy), NEW)
    assert (copy / "ping").stat().st_uid == NEW + 1000


async def test_a_full_disk_is_told(tree: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=True)
    try:
        (tree / "large").write_bytes(bytes(1 << 20))
        with pytest.raises(AlveoleError, match="the disk is full") as error:
            await copy_tree(tree, small / "copy")
        assert error.value.code is ErrorCode.EXHAUSTED
    finally:
        subprocess.run(["umount", small], check=True)


def told(upper: Path, *layers: Path, limit: int = 100) -> list[str]:
    argv = [sys.executable, "-ISs", upper_diff.__file__, str(limit), str(upper), *map(str, layers)]
    lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    return [f"{item[0]} {item[1]}" if item else "more" for item in found]


async def test_an_overlay_tells_what_was_added_changed_and_deleted(tmp_path: Path) -> None:
    lower, middle, upper, root = (tmp_path / name for name in ("lower", "middle", "upper", "root"))
    (lower / "etc/old").mkdir(parents=True)
    (lower / "etc/passwd").write_text("root")
    (lower / "etc/old/file").write_text("x")
    (lower / "etc/old/hidden").write_text("x")
    (lower / "bin").mkdir()
    (lower / "bin/true").write_text("x")
    (lower / "bin/never").write_text("x")
    (middle / "bin").mkdir(parents=True)
    os.mknod(middle / "bin/never", stat.S_IFCHR, 0)
    await mount.mount_overlay(root, (lower, middle), upper, tmp_path / "work", shift=None, scratch=tmp_path / "scratch")
    try:
        assert told(upper, middle, lower) == []
        (root / "etc/passwd").write_text("more")
        (root / "bin/true").unlink()
        (root / "bin/never").write_text("again")
        (root / "new").mkdir()
        (root / "new/a\nb").write_text("")
        subprocess.run(["rm", "-r", root / "etc/old"], check=True)
        (root / "etc/old").mkdir()
        (root / "etc/old/file").write_text("y")
    finally:
        await mount.unmount(root)
    expected = ["C /bin", "C /etc", "A /new", "A /bin/never", "D /bin/true", "C /etc/old", "C /etc/passwd"]
    expected += ["C /etc/old/file", "D /etc/old/hidden", "A /new/a\nb"]
    assert sorted(told(upper, middle, lower)) == sorted(expected)
    assert told(upper, middle, lower, limit=2)[2:] == ["more"]
    assert len(told(upper, middle, lower, limit=2)) == 3


def test_a_tree_that_is_deeper_than_paths_can_be_is_told_as_far_as_it_is_reached(tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 30 ]; do n=$(printf %0200d $i); mkdir $n && cd $n; i=$((i + 1)); done"
    subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True)
    assert 10 < len(told(tmp_path)) < 30
