"""Root disks of machines in the pool, and volumes given to a machine, on the real kernel."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from alveole.host.loop import mount_image
from alveole.host.mount import unmount
from alveole.host.mountinfo import is_mountpoint
from alveole.model.error import AlveoleError, ErrorCode
from alveole.volume.disk import DiskVolumes
from tests.integration.test_volume import driver, loops_of, mount_namespace, place, small_disk, volume

__all__ = ["place", "small_disk"]  # fixtures
pytestmark = pytest.mark.root

MIB = 1 << 20
KEY, OTHER_KEY = "a" * 64, "b" * 64
WEB, DB = "00000000000a", "00000000000b"


class Maker:
    """Makes base disks of some bytes, and counts them. ``gate`` holds it back while it is clear."""

    def __init__(self, data: bytes = b"base" * MIB) -> None:
        self.data = data
        self.made = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, target: Path) -> None:
        target.write_bytes(self.data[:4096])
        await self.gate.wait()
        target.write_bytes(self.data)
        self.made += 1


def pool(place: Path) -> Path:
    return place / "run/storage/pool"


def files(place: Path) -> list[str]:
    return sorted(str(path.relative_to(pool(place))) for path in pool(place).rglob("*") if path.is_file())


def blocks_free(place: Path) -> int:
    status = os.statvfs(pool(place))
    return status.f_bfree * status.f_frsize


async def clean(volumes: DiskVolumes) -> None:
    for instance in (WEB, DB):
        await volumes.remove_root_disk(instance)
    await volumes.collect_bases(())


async def test_each_instance_has_a_copy_of_its_own_that_takes_only_what_it_changes(place: Path) -> None:
    volumes = driver(place)
    base = await volumes.base_disk(KEY, Maker(os.urandom(32 * MIB)))
    before = blocks_free(place)
    web, db = await volumes.root_disk(WEB, base), await volumes.root_disk(DB, base)
    assert before - blocks_free(place) < MIB
    with web.open("r+b") as file:
        file.write(b"mine")
    assert base.read_bytes() == db.read_bytes()
    assert web.read_bytes() == b"mine" + base.read_bytes()[4:]
    assert web.stat().st_mode & 0o777 == 0o600
    for directory in (web.parent, base.parent):
        assert directory.stat().st_mode & 0o077 == 0
    await clean(volumes)


async def test_a_root_disk_keeps_its_changes_whatever_becomes_of_its_base(place: Path) -> None:
    volumes = driver(place)
    base = await volumes.base_disk(KEY, Maker())
    web = await volumes.root_disk(WEB, base)
    web.write_bytes(b"changed")
    assert await volumes.collect_bases({OTHER_KEY}) >= 4 * MIB
    restarted = driver(place)
    await restarted.recover([], [WEB])
    assert await restarted.root_disk(WEB, base) == web
    assert web.read_bytes() == b"changed"
    with pytest.raises(AlveoleError, match="is not there") as caught:
        await restarted.root_disk(DB, base)
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert files(place) == [f"roots/{WEB}.img"]
    await restarted.remove_root_disk(WEB)
    await restarted.remove_root_disk(WEB)
    assert files(place) == []


async def test_a_base_is_made_once_however_many_ask(place: Path) -> None:
    volumes, make = driver(place), Maker()
    make.gate.clear()
    asking = [asyncio.create_task(volumes.base_disk(KEY, make)) for _ in range(5)]
    other = await volumes.base_disk(OTHER_KEY, Maker())  # one image does not wait for another
    make.gate.set()
    assert set(await asyncio.gather(*asking)) == {other.with_name(f"{KEY}.img")}
    assert await driver(place).base_disk(KEY, make) == other.with_name(f"{KEY}.img")
    assert make.made == 1
    assert await volumes.collect_bases({KEY}) > 0
    assert files(place) == [f"base/{KEY}.img"]
    assert await volumes.collect_bases({KEY}) == 0
    await clean(volumes)


async def test_a_base_whose_making_ends_early_is_never_there(place: Path) -> None:
    volumes, make = driver(place), Maker()
    make.gate.clear()
    first = asyncio.create_task(volumes.base_disk(KEY, make))
    second = asyncio.create_task(volumes.base_disk(KEY, make))
    while not pool(place).exists() or not files(place):  # noqa: ASYNC110  (the kernel does not tell)
        await asyncio.sleep(0.005)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    make.gate.set()
    assert (await second).read_bytes() == make.data  # whoever waited makes it
    await clean(volumes)


async def test_recover_removes_what_is_half_made_or_nobodys(place: Path) -> None:
    volumes = driver(place)
    await volumes.create(volume())
    base = await volumes.base_disk(KEY, Maker())
    for instance in (WEB, DB):
        await volumes.root_disk(instance, base)
    for half in (base.with_suffix(".new"), pool(place) / "roots/00000000000c.new"):
        half.write_bytes(b"half")
    await driver(place).recover([volume()], [WEB])
    assert files(place) == [f"{volume().id}.img", f"base/{KEY}.img", f"roots/{WEB}.img"]
    await clean(volumes)
    await volumes.remove(volume().id)


async def test_half_made_disks_do_not_hinder_new_ones(place: Path) -> None:
    volumes, make = driver(place), Maker()
    base = await volumes.base_disk(KEY, make)
    (base.parent / f"{OTHER_KEY}.new").write_bytes(b"half" * 3 * MIB)
    assert (await volumes.base_disk(OTHER_KEY, make)).read_bytes() == make.data
    (pool(place) / "roots").mkdir()
    (pool(place) / f"roots/{WEB}.new").write_bytes(b"half" * 3 * MIB)
    assert (await volumes.root_disk(WEB, base)).read_bytes() == make.data
    await clean(volumes)


async def test_where_no_machine_ever_was_removing_makes_nothing(place: Path) -> None:
    volumes = driver(place)
    await volumes.remove_root_disk(WEB)
    assert await volumes.collect_bases(()) == 0
    await volumes.recover([], [])
    await volumes.close()
    assert list(place.iterdir()) == []


async def test_after_close_only_what_is_kept_is_in_the_pool(place: Path) -> None:
    volumes = driver(place)
    await volumes.root_disk(WEB, await volumes.base_disk(KEY, Maker()))
    await volumes.collect_bases(())
    await volumes.close()
    assert loops_of(place) == []
    assert not (place / "run/storage").exists()
    reopened = driver(place)
    await reopened.recover([], [WEB])
    assert [path.name for path in pool(place).iterdir()] == ["roots"]
    await clean(reopened)
    await reopened.close()
    await reopened.recover([], [])
    assert list(pool(place).iterdir()) == []


async def test_a_disk_in_use_outlives_close_and_is_found_again(place: Path) -> None:
    """A machine goes on while the daemon is away: the pool is mounted again from the device it is on already."""
    volumes = driver(place)
    web = await volumes.root_disk(WEB, await volumes.base_disk(KEY, Maker()))
    with web.open("r+b") as file:
        await volumes.close()
        assert not is_mountpoint(pool(place))
        file.write(b"mine")
        file.flush()
        assert len(loops_of(place)) == 1
        restarted = driver(place)
        await restarted.recover([], [WEB])
        assert web.read_bytes()[:4] == b"mine"
        assert len(loops_of(place)) == 1
    await clean(restarted)


async def test_in_a_state_directory_with_reflink(place: Path) -> None:
    image = place / "host-disk"
    with image.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    await mount_image(image, place / "state", "xfs", options="")
    volumes, make = driver(place), Maker()
    web = await volumes.root_disk(WEB, await volumes.base_disk(KEY, make))
    assert web == place / f"state/volumes/roots/{WEB}.img"
    assert web.read_bytes() == make.data
    await clean(volumes)
    await volumes.close()
    assert list((place / "state/volumes").iterdir()) == []
    await unmount(place / "state")


async def test_no_room_is_told_before_anything_is_written(small_disk: Path) -> None:
    volumes, make = driver(small_disk), Maker()
    with pytest.raises(AlveoleError, match="no space for the root disk of an image") as caught:
        await volumes.base_disk(KEY, make, need_bytes=3 << 30)
    assert caught.value.code is ErrorCode.EXHAUSTED
    assert make.made == 0
    base = await volumes.base_disk(KEY, make, need_bytes=4 * MIB)
    free = os.statvfs(small_disk / "state")
    with (small_disk / "state/ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 50 * MIB)
    with pytest.raises(AlveoleError, match="no space for the root disk of an instance") as caught:
        await volumes.root_disk(WEB, base)
    assert caught.value.code is ErrorCode.EXHAUSTED
    assert files(small_disk) == [f"base/{KEY}.img"]
    await clean(volumes)


async def test_a_pool_that_fills_up_meanwhile_keeps_nothing_of_it(place: Path) -> None:
    volumes = driver(place)
    base = await volumes.base_disk(OTHER_KEY, Maker())

    async def make(target: Path) -> None:
        with target.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 1 << 50)

    with pytest.raises(AlveoleError, match="no space for a root disk") as caught:
        await volumes.base_disk(KEY, make)
    assert caught.value.code is ErrorCode.EXHAUSTED
    assert files(place) == [f"base/{base.name}"]
    await clean(volumes)


# --- volumes for machines --------------------------------------------------------------------------------------------


@contextmanager
def machine_with(disk: Path) -> Iterator[None]:
    """A process that holds a lock on the disk as QEMU does: shared, on single bytes, of the open file."""
    code = "import fcntl,struct,sys; f=open(sys.argv[1],'r+b')\n"
    code += "fcntl.fcntl(f, fcntl.F_OFD_SETLK, struct.pack('hhqqi0q', fcntl.F_RDLCK, 0, 101, 1, 0)); print('ready')\n"
    code += "sys.stdout.flush(); sys.stdin.read()"
    argv = ["python3", "-c", code, str(disk)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        process.communicate()


async def test_what_containers_wrote_a_machine_reads_and_back(place: Path) -> None:
    volumes = driver(place)
    await volumes.create(volume())
    (await volumes.ensure_mounted(volume()) / "file").write_text("kept")
    await volumes.ensure_unmounted(volume().id)
    disk = await volumes.ensure_disk(volume())
    assert disk == await volumes.ensure_disk(volume()) == pool(place) / f"{volume().id}.img"
    read = subprocess.run(["debugfs", "-R", "cat file", disk], check=True, capture_output=True, text=True)
    assert read.stdout == "kept"
    os.chown(disk, 12345, 12345)  # whoever runs the machine
    assert (await volumes.ensure_mounted(volume()) / "file").read_text() == "kept"
    await volumes.remove(volume().id)


async def test_a_mounted_volume_is_no_machines(place: Path) -> None:
    volumes = driver(place)
    await volumes.create(volume())
    await volumes.ensure_mounted(volume())
    with pytest.raises(AlveoleError, match="volume data1 is mounted on this node") as caught:
        await driver(place).ensure_disk(volume())
    assert caught.value.code is ErrorCode.CONFLICT
    await volumes.remove(volume().id)


async def test_a_volume_still_mounted_elsewhere_is_no_machines(place: Path) -> None:
    volumes = driver(place)
    await volumes.create(volume())
    target = await volumes.ensure_mounted(volume())
    with mount_namespace("private", inside=target):
        await volumes.ensure_unmounted(volume().id)
        with pytest.raises(AlveoleError, match="data1 is still mounted") as caught:
            await volumes.ensure_disk(volume())
        assert caught.value.code is ErrorCode.CONFLICT
    assert (await volumes.ensure_disk(volume())).exists()
    await volumes.remove(volume().id)


async def test_what_a_running_machine_has_is_neither_checked_nor_mounted(place: Path) -> None:
    """Whatever else is thought to hold it, by a daemon that was killed or lost its records."""
    volumes = driver(place)
    await volumes.create(volume())
    disk = await volumes.ensure_disk(volume())
    with machine_with(disk):
        for ensure in (driver(place).ensure_mounted, driver(place).ensure_disk):
            with pytest.raises(AlveoleError, match="data1 is the disk of a machine that still runs") as caught:
                await ensure(volume())
            assert caught.value.code is ErrorCode.CONFLICT
    await volumes.ensure_mounted(volume())
    await volumes.remove(volume().id)


async def test_a_lost_or_damaged_disk_is_told_by_name(place: Path) -> None:
    volumes = driver(place)
    with pytest.raises(AlveoleError, match="volume data1 has no disk") as caught:
        await volumes.ensure_disk(volume())
    assert caught.value.code is ErrorCode.NOT_FOUND
    await volumes.create(volume())
    with (pool(place) / f"{volume().id}.img").open("r+b") as file:
        file.write(b"\xff" * MIB)
    with pytest.raises(AlveoleError, match="volume data1 is damaged"):
        await volumes.ensure_disk(volume())
    await volumes.remove(volume().id)
