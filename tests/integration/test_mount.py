"""Overlays, binds and unmounting on the real kernel."""

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alveole.host.mount import (
    IdShift,
    bind,
    bind_idmapped,
    ensure_private,
    mount_overlay,
    unmount,
    unmount_below,
)
from alveole.host.mountinfo import is_mountpoint, mounts, targets_below
from alveole.model.error import AlveoleError, ErrorCode

pytestmark = pytest.mark.root

BASE = 15 << 28  # beyond the windows that daemons claim
SIZE = 65536


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing may stay mounted, nor be undone by the test's fixtures first."""
    yield tmp_path
    left = targets_below(tmp_path)
    for target in left:
        subprocess.run(["umount", "-l", target], check=True)
    assert left == []


@pytest.fixture
def shift() -> Iterator[IdShift]:
    """A user namespace kept by a sleeping process."""
    process = subprocess.Popen(["unshare", "--user", "sleep", "60"])
    own = Path("/proc/self/ns/user").readlink()
    while Path(f"/proc/{process.pid}/ns/user").readlink() == own:
        time.sleep(0.002)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{process.pid}/{name}").write_text(f"0 {BASE} {SIZE}")
    yield IdShift(base=BASE, size=SIZE, user_namespace=Path(f"/proc/{process.pid}/ns/user"))
    process.kill()
    process.wait()


def inside(shift: IdShift, script: str, directory: Path) -> str:
    """What a shell run as root of the user namespace prints."""
    argv = ["nsenter", f"--user={shift.user_namespace}", "-S", "0", "-G", "0", "sh", "-ec", script]
    return subprocess.run(argv, cwd=directory, check=True, capture_output=True, text=True).stdout


def layers(place: Path, number: int) -> list[Path]:
    made = []
    for index in range(number):
        layer = place / f"layer{index}"
        layer.mkdir(mode=0o755)
        (layer / f"only{index}").write_text(str(index))
        (layer / "same").write_text(str(index))
        made.append(layer)
    place.chmod(0o755)
    return made


def slave_namespace() -> subprocess.Popen[str]:
    """A mount namespace that receives what spreads; told to go on, it prints what is mounted in it."""
    argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", "echo ready; read go; cat /proc/self/mountinfo"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


async def overlay(place: Path, lowers: list[Path], shift: IdShift | None) -> Path:
    target = place / "root"
    await mount_overlay(target, lowers, place / "upper", place / "work", shift=shift, scratch=place / "scratch")
    return target


async def test_root_of_a_user_namespace_owns_the_files_of_an_overlay_and_layers_stay_as_they_were(
    place: Path, shift: IdShift
) -> None:
    lowers = layers(place, 3)
    os.chown(lowers[2] / "only2", 999, 998)
    lowers[2].chmod(0o751)
    root = await overlay(place, lowers, shift)
    assert inside(shift, "stat -c %u:%g:%a . only0 only2 | xargs", root) == "0:0:751 0:0:644 999:998:644\n"
    inside(shift, "cat same > copy; echo changed > same; rm only1; chown 33:33 only0", root)
    assert (root / "copy").read_text() == "2"
    assert (root / "same").stat().st_uid == BASE  # the host sees shifted ids
    assert (place / "upper/only0").stat().st_uid == BASE + 33
    assert [(layer / "same").read_text() for layer in lowers] == ["0", "1", "2"]
    assert (lowers[1] / "only1").exists()
    assert (lowers[0] / "only0").stat().st_uid == 0
    await unmount(root)


async def test_an_overlay_keeps_what_was_written_over_unmount_and_mount(place: Path, shift: IdShift) -> None:
    lowers = layers(place, 1)
    root = await overlay(place, lowers, shift)
    inside(shift, "echo kept > new; chmod 700 .", root)
    await unmount(root)
    await overlay(place, lowers, shift)
    assert inside(shift, "cat new; stat -c %a .", root) == "kept\n700\n"
    await unmount(root)


async def test_without_shift_ids_are_as_in_the_image(place: Path) -> None:
    lowers = layers(place, 2)
    os.chown(lowers[1], 5, 6)
    root = await overlay(place, lowers, None)
    assert (root.stat().st_uid, root.stat().st_gid) == (5, 6)
    await unmount(root)


async def test_a_hundred_layers(place: Path, shift: IdShift) -> None:
    root = await overlay(place, layers(place, 100), shift)
    assert (root / "same").read_text() == "99"
    assert len(list(root.glob("only*"))) == 100
    await unmount(root)


async def test_more_layers_than_fit_are_refused_with_their_number(place: Path) -> None:
    with pytest.raises(AlveoleError, match=r"has 300 layers, at most \d+ ") as caught:
        await overlay(place, layers(place, 300), None)
    assert caught.value.code is ErrorCode.INVALID
    assert not is_mountpoint(place / "root")


async def test_an_image_root_owned_by_an_id_that_no_instance_has_is_refused(place: Path, shift: IdShift) -> None:
    [layer] = layers(place, 1)
    os.chown(layer, SIZE, 0)
    with pytest.raises(AlveoleError) as caught:
        await overlay(place, [layer], shift)
    assert caught.value.code is ErrorCode.INVALID


async def test_mounting_again_keeps_what_is_mounted_and_unmounting_again_does_nothing(place: Path) -> None:
    lowers = layers(place, 1)
    root = await overlay(place, lowers, None)
    first = [entry.id for entry in mounts() if entry.target == str(root)]
    await overlay(place, lowers, None)
    assert [entry.id for entry in mounts() if entry.target == str(root)] == first
    await unmount(root)
    await unmount(root)
    await unmount(place / "never-existed")
    assert not is_mountpoint(root)


async def test_what_a_killed_daemon_left_in_scratch_does_not_hinder(place: Path) -> None:
    scratch = place / "scratch"
    scratch.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "left", scratch], check=True)
    (scratch / "0").mkdir()
    subprocess.run(["mount", "--bind", place, scratch / "0"], check=True)
    root = await overlay(place, layers(place, 2), None)
    assert not scratch.exists()
    await unmount(root)


async def test_a_cancelled_mount_is_undone(place: Path) -> None:
    lowers = layers(place, 50)
    mounting = asyncio.ensure_future(overlay(place, lowers, None))
    await asyncio.sleep(0.001)
    mounting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await mounting
    assert not is_mountpoint(place / "root")
    assert not (place / "scratch").exists()


async def test_bind_of_a_file_and_of_a_directory_read_only(place: Path) -> None:
    source = place / "source"
    source.mkdir()
    (source / "file").write_text("x")
    await bind(source, place / "a/b", read_only=True, recursive=False)
    await bind(source / "file", place / "c/file", read_only=False, recursive=False)
    with pytest.raises(OSError, match="Read-only"):
        (place / "a/b/file").write_text("y")
    (place / "c/file").write_text("z")
    assert (source / "file").read_text() == "z"
    line = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(place / "a/b") in line)
    assert {"ro", "nosuid", "nodev"} <= set(line.split()[5].split(","))
    assert "shared:" not in line
    await unmount_below(place)


async def test_id_mapped_bind_is_the_same_ids_inside_and_on_disk(place: Path, shift: IdShift) -> None:
    source = place / "source"
    source.mkdir()
    place.chmod(0o755)
    await bind_idmapped(source, place / "m", shift.user_namespace, read_only=False, recursive=False)
    inside(shift, "echo x > file; chown 7:8 file", place / "m")
    assert ((source / "file").stat().st_uid, (source / "file").stat().st_gid) == (7, 8)
    assert (place / "m/file").stat().st_uid == BASE + 7
    await unmount(place / "m")


async def test_a_filesystem_that_cannot_be_id_mapped_is_named(place: Path, shift: IdShift) -> None:
    with pytest.raises(AlveoleError, match=r"/proc .*\(proc\)") as caught:
        await bind_idmapped(Path("/proc"), place / "m", shift.user_namespace, read_only=True, recursive=False)
    assert caught.value.code is ErrorCode.UNSUPPORTED


async def test_recursive_bind_shows_what_is_mounted_below_and_plain_bind_does_not(place: Path) -> None:
    source = place / "source"
    (source / "below").mkdir(parents=True)
    (place / "other").mkdir()
    (place / "other/file").write_text("x")
    await bind(place / "other", source / "below", read_only=False, recursive=False)
    await bind(source, place / "plain", read_only=False, recursive=False)
    await bind(source, place / "deep", read_only=True, recursive=True)
    assert not (place / "plain/below/file").exists()
    with pytest.raises(OSError, match="Read-only"):
        (place / "deep/below/file").write_text("y")
    await unmount_below(place)


async def test_unmount_of_a_busy_mount_succeeds_and_ends_with_its_user(place: Path) -> None:
    (place / "source").mkdir()
    await bind(place / "source", place / "m", read_only=False, recursive=False)
    holder = os.open(place / "m", os.O_RDONLY)
    try:
        await unmount(place / "m")
        assert not is_mountpoint(place / "m")
    finally:
        os.close(holder)


async def test_what_is_mounted_below_a_private_directory_does_not_spread(place: Path) -> None:
    """Another mount namespace, a slave of ours, must not get (and so keep) our mounts."""
    shared, own = place / "shared", place / "shared/own"
    own.mkdir(parents=True)
    subprocess.run(["mount", "--bind", shared, shared], check=True)
    subprocess.run(["mount", "--make-shared", shared], check=True)
    await ensure_private(own)
    await ensure_private(own)
    (own / "m").mkdir()
    other = slave_namespace()
    await bind(place / "shared", own / "m", read_only=False, recursive=False)
    seen, _ = other.communicate("go\n")
    assert f"{own} " in seen
    assert f"{own / 'm'} " not in seen
    await unmount_below(place)
