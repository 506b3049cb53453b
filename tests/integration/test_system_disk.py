"""Disks that boot, made of small trees: what e2fsprogs finds in them, and what is refused."""

import os
import subprocess
from pathlib import Path

import pytest

from alveole.image.system_disk import FIRST_BYTES, make_disk
from alveole.model.error import AlveoleError, ErrorCode

pytestmark = pytest.mark.root

BOOT = b"\xeb" * 510 + b"\x55\xaa"
CORE = b"core" * 1000


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    for name, content in {"usr/lib/grub/i386-pc/boot.img": BOOT, "boot/grub/core.img": CORE, "etc/name": b"me"}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    os.chown(tree / "etc/name", 7, 8)
    return tree


def inside(disk: Path, command: str) -> str:
    argv = ("debugfs", "-R", command, f"{disk}?offset={FIRST_BYTES}")
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


async def test_the_tree_is_in_the_partition(tree: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    await make_disk(tree, 512, disk)
    status = disk.stat()
    assert (status.st_size, status.st_mode & 0o777) == (512 << 20, 0o600)
    assert status.st_blocks * 512 < 100 << 20  # sparse
    assert disk.read_bytes()[512 : 512 + len(CORE)] == CORE
    assert inside(disk, "cat /etc/name") == "me"
    assert "User:     7   Group:     8" in inside(disk, "stat /etc/name")
    assert {"dev", "proc", "sys", "run", "tmp"} <= set(inside(disk, "ls /").split())
    check = ("e2fsck", "-fn", f"{disk}?offset={FIRST_BYTES}")
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0


async def test_a_tree_that_does_not_fit_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "large").write_bytes(os.urandom(1 << 20) * 24)
    with pytest.raises(AlveoleError, match="does not fit in 16 MiB") as caught:
        await make_disk(tree, 16, tmp_path / "disk")
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID, "disk_mib")


async def test_no_link_of_the_tree_leads_to_the_host(tree: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    core = tree / "boot/grub/core.img"
    core.unlink()
    core.symlink_to(secret)
    with pytest.raises(AlveoleError, match=r"core\.img of the system has 0 bytes"):
        await make_disk(tree, 512, tmp_path / "disk")
