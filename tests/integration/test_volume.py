"""Volumes on the real kernel: loop devices, XFS, ext4. Each test has its own pool, and nothing may be left of it."""

import ipaddress
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from alveole.host.identity import Identity
from alveole.host.loop import mount_image
from alveole.host.mount import unmount, unmount_below
from alveole.host.mountinfo import is_mountpoint, targets_below
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.volume import Volume
from alveole.volume.disk import DiskVolumes
from alveole.volume.pool import file_size

pytestmark = pytest.mark.root

MIB = 1 << 20
GIB = 1 << 30


def identity_at(directory: Path) -> Identity:
    pool = ipaddress.IPv4Network("10.99.0.0/16")
    return Identity(id="00000000", state=directory / "state", run=directory / "run", uid_base=0, pool=pool)


def driver(directory: Path) -> DiskVolumes:
    """As after a start of the daemon: it remembers nothing."""
    identity = identity_at(directory)
    return DiskVolumes(identity, identity.state / "volumes")


def volume(number: int = 1, size_bytes: int = 64 * MIB) -> Volume:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return Volume(id=f"{number:012x}", name=f"data{number}", size_bytes=size_bytes, created_at=moment)


def loops_of(directory: Path) -> list[str]:
    """Files of the driver that are bound to a device; the disk that a test makes for itself is none."""
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    bound = [file.read_text().strip() for file in files]
    return [name for name in bound if name.startswith(str(directory)) and not name.endswith("/host-disk")]


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Path]:
    """A directory of which, after close(), no mount and no loop device may remain."""
    yield tmp_path
    await driver(tmp_path).close()
    deadline = time.monotonic() + 3
    while loops_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [*targets_below(tmp_path), *loops_of(tmp_path)]
    await unmount_below(tmp_path)
    assert left == []


def lose_run_directory(place: Path) -> None:
    shutil.rmtree(place / "run")


async def test_a_volume_is_an_empty_root_owned_directory_of_nearly_its_size(place: Path) -> None:
    volumes = driver(place)
    await volumes.create(volume(size_bytes=256 * MIB))
    target = await volumes.ensure_mounted(volume(size_bytes=256 * MIB))
    status = target.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 0, 0o755)
    assert list(target.iterdir()) == []
    filesystem = os.statvfs(target)
    assert 0.85 * 256 * MIB < filesystem.f_bavail * filesystem.f_frsize <= 256 * MIB
    assert filesystem.f_flag & os.ST_NOSUID
    assert target.parent.parent.stat().st_mode & 0o077 == 0  # other users of the host do not reach in
    await volumes.remove(volume().id)


async def test_its_size_holds_and_its_neighbour_is_not_touched(place: Path) -> None:
    volumes = driver(place)
    for number in (1, 2):
        await volumes.create(volume(number))
    first, second = [await volumes.ensure_mounted(volume(number)) for number in (1, 2)]
    (second / "before").write_text("x")
    fill = ["dd", "if=/dev/zero", f"of={first / 'big'}", "bs=1M", "count=80"]
    filled = subprocess.run(fill, check=False, capture_output=True)
    assert b"No space left" in filled.stderr
    assert (first / "big").stat().st_size < 64 * MIB
    (second / "after").write_bytes(bytes(30 * MIB))
    assert (second / "before").read_text() == "x"
    for number in (1, 2):
        await volumes.ensure_unmounted(volume(number).id)


async def test_what_is_written_survives_unmount_restart_and_reboot(place: Path) -> None:
    volumes = driver(place)
    await volumes.create(volume())
    target = await volumes.ensure_mounted(volume())
    (target / "kept").write_text("kept")
    restarted = driver(place)
    await restarted.recover([volume()], [])
    assert await restarted.ensure_mounted(volume()) == target
    assert (target / "kept").read_text() == "kept"
    await restarted.ensure_unmounted(volume().id)
    assert not target.exists()
    await restarted.close()
    lose_run_directory(place)
    rebooted = driver(place)
    await rebooted.recover([volume()], [])
    assert (await rebooted.ensure_mounted(volume()) / "kept").read_text() == "kept"
    await rebooted.remove(volume().id)


async def test_every_method_may_be_called_twice(place: Path) -> None:
    volumes = driver(place)
    for _ in range(2):
        await volumes.recover([], [])
        await volumes.ensure_unmounted(volume().id)
        await volumes.remove(volume().id)
        await volumes.close()
    for _ in range(2):
        await volumes.create(volume())
    assert await volumes.ensure_mounted(volume()) == await volumes.ensure_mounted(volume())
    assert len(targets_below(place / "run/storage/volumes")) == 1
    for _ in range(2):
        await volumes.remove(volume().id)
    assert list((place / "run/storage/pool").iterdir()) == []


async def test_a_power_cut_in_the_middle_of_writing_is_repaired_before_the_mount(place: Path) -> None:
    """The disk as it is while mounted and written to is what a power cut leaves."""
    volumes = driver(place)
    await volumes.create(volume())
    target = await volumes.ensure_mounted(volume())
    with (target / "synced").open("w") as file:
        file.write("synced")
        file.flush()
        os.fsync(file.fileno())
    disk = place / f"run/storage/pool/{volume().id}.img"
    cut = disk.with_name(f"{volume(2).id}.img")
    subprocess.run(["cp", "--reflink=always", disk, cut], check=True)
    dump = subprocess.run(["dumpe2fs", "-h", cut], capture_output=True, text=True, check=True)
    assert "needs_recovery" in dump.stdout
    assert (await volumes.ensure_mounted(volume(2)) / "synced").read_text() == "synced"
    for number in (1, 2):
        await volumes.remove(volume(number).id)


async def test_a_damaged_disk_is_refused_by_name_and_kept(place: Path) -> None:
    volumes = driver(place)
    await volumes.create(volume())
    disk = place / f"run/storage/pool/{volume().id}.img"
    with disk.open("r+b") as file:
        file.write(b"\xff" * MIB)
    with pytest.raises(AlveoleError, match=r"volume data1 is damaged") as caught:
        await volumes.ensure_mounted(volume())
    assert caught.value.code is ErrorCode.INTERNAL
    assert disk.exists()
    assert not (place / f"run/storage/volumes/{volume().id}").exists()
    await volumes.remove(volume().id)


async def test_a_lost_disk_is_told_by_name(place: Path) -> None:
    with pytest.raises(AlveoleError, match="volume data1 has no disk") as caught:
        await driver(place).ensure_mounted(volume())
    assert caught.value.code is ErrorCode.NOT_FOUND


async def test_recover_removes_half_made_and_unknown_disks_only(place: Path) -> None:
    volumes = driver(place)
    for number in (1, 2, 3):
        await volumes.create(volume(number))
    for number in (1, 2):
        await volumes.ensure_mounted(volume(number))
    disks = place / "run/storage/pool"
    (disks / f"{volume(4).id}.new").write_bytes(b"half")
    await driver(place).recover([volume(1)], [])
    assert [path.name for path in disks.iterdir()] == [f"{volume(1).id}.img"]
    assert is_mountpoint(place / f"run/storage/volumes/{volume(1).id}")
    await volumes.remove(volume(1).id)


@contextmanager
def mount_namespace(propagation: str, *, inside: Path | None = None) -> Iterator[None]:
    """A mount namespace that has copies of all our mounts, as a service of the host or an instance has.

    Its process works ``inside`` a directory: that keeps a mount alive also when its mount point is removed.
    """
    argv = ["unshare", "--mount", "--propagation", propagation, "sh", "-c", "echo ready; read go"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=inside) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        process.communicate(b"go\n")


async def test_a_disk_still_held_somewhere_is_never_attached_twice(place: Path) -> None:
    """Two devices of one disk would destroy its filesystem."""
    volumes = driver(place)
    await volumes.create(volume())
    target = await volumes.ensure_mounted(volume())
    (target / "file").write_text("x")
    with mount_namespace("private", inside=target):
        await volumes.ensure_unmounted(volume().id)
        assert not is_mountpoint(target)
        assert len([file for file in loops_of(place) if volume().id in file]) == 1
        assert await volumes.ensure_mounted(volume()) == target
        assert (target / "file").read_text() == "x"
        assert len([file for file in loops_of(place) if volume().id in file]) == 1
        await volumes.remove(volume().id)
        assert list((place / "run/storage/pool").iterdir()) == []


async def test_services_of_the_host_do_not_keep_a_disk_alive(place: Path) -> None:
    """systemd gives services slave copies of all mounts: what we unmount must end there too."""
    volumes = driver(place)
    await volumes.create(volume())
    await volumes.ensure_mounted(volume())
    with mount_namespace("slave"):
        await volumes.remove(volume().id)
        await volumes.close()
        assert loops_of(place) == []


async def test_more_than_the_disk_has_is_refused_with_what_it_has(place: Path) -> None:
    volumes = driver(place)
    with pytest.raises(AlveoleError, match=r"data1 of \d+ MiB does not fit.* has room for \d+ MiB") as caught:
        await volumes.create(volume(size_bytes=1 << 50))
    assert caught.value.code is ErrorCode.EXHAUSTED


@pytest.fixture
async def small_disk(place: Path) -> AsyncIterator[Path]:
    """An ext4 of 2 GiB for the state directory, as a host's disk."""
    image = place / "host-disk"
    with image.open("wb") as file:
        file.truncate(2 * GIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
    await mount_image(image, place / "state", "ext4", options="errors=remount-ro")
    yield place
    await driver(place).close()
    await unmount(place / "state")


async def test_the_pool_grows_with_the_disk_it_lies_on(small_disk: Path) -> None:
    ballast = small_disk / "state/ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 900 * MIB)
    volumes = driver(small_disk)
    await volumes.create(volume())
    pool = small_disk / "run/storage/pool"
    before = os.statvfs(pool).f_blocks
    with pytest.raises(AlveoleError) as caught:
        await volumes.create(volume(2, 1200 * MIB))
    assert caught.value.code is ErrorCode.EXHAUSTED
    ballast.unlink()
    await volumes.create(volume(2, 1200 * MIB))
    assert os.statvfs(pool).f_blocks > before * 1.3
    target = await volumes.ensure_mounted(volume(2, 1200 * MIB))
    (target / "file").write_bytes(bytes(MIB))
    await volumes.remove(volume(2).id)


async def test_a_full_disk_is_told_before_anything_is_made(small_disk: Path) -> None:
    with (small_disk / "state/ballast").open("wb") as file:
        free = os.statvfs(small_disk / "state")
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 50 * MIB)
    with pytest.raises(AlveoleError, match="is full") as caught:
        await driver(small_disk).create(volume(size_bytes=16 * MIB))
    assert caught.value.code is ErrorCode.EXHAUSTED
    assert list((small_disk / "state/volumes").iterdir()) == []


async def test_space_of_a_removed_volume_goes_back_to_the_disk(small_disk: Path) -> None:
    volumes = driver(small_disk)
    await volumes.create(volume(size_bytes=400 * MIB))
    target = await volumes.ensure_mounted(volume(size_bytes=400 * MIB))
    with (target / "file").open("wb") as file:
        for _ in range(100):
            file.write(bytes(MIB))
        os.fsync(file.fileno())
    pool = small_disk / "state/volumes/pool.xfs"
    used = pool.stat().st_blocks * 512
    await volumes.remove(volume().id)
    await volumes.close()
    assert pool.stat().st_blocks * 512 < used - 70 * MIB


async def test_a_state_directory_with_reflink_needs_no_pool_file(place: Path) -> None:
    image = place / "host-disk"
    with image.open("wb") as file:
        file.truncate(GIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    await mount_image(image, place / "state", "xfs", options="")
    volumes = driver(place)
    await volumes.create(volume())
    target = await volumes.ensure_mounted(volume())
    (target / "file").write_text("x")
    assert [path.name for path in (place / "state/volumes").iterdir()] == [f"{volume().id}.img"]
    await volumes.remove(volume().id)
    await volumes.close()
    await unmount(place / "state")


def test_a_pool_file_is_all_the_disk_can_give_but_never_too_small_for_xfs() -> None:
    assert file_size(10 * GIB + 5) == 10 * GIB
    assert file_size(3 * MIB) == GIB
