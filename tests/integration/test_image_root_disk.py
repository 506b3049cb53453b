"""Root disks made of layers, read back by the kernel that mounts them."""

import asyncio
import os
import signal
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from alveole.host.loop import mount_image
from alveole.host.mount import unmount
from alveole.host.mountinfo import targets_below
from alveole.image.root_disk import make_root_disk
from alveole.model.error import AlveoleError, ErrorCode
from tests.integration.test_volume import loops_of

pytestmark = pytest.mark.root

MIB = 1 << 20
GIB = 1 << 30
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing may stay mounted."""
    yield tmp_path
    left = targets_below(tmp_path)
    for target in left:
        subprocess.run(["umount", "-l", target], check=True)
    assert left == []
    assert loops_of(tmp_path) == []


def layer(place: Path, name: str) -> Path:
    made = place / name
    made.mkdir()
    return made


def hide(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def content(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


@asynccontextmanager
async def mounted(disk: Path) -> AsyncIterator[Path]:
    """Its filesystem without fault, mounted."""
    subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True)
    target = disk.with_suffix(".mounted")
    await mount_image(disk, target, "ext4", options="")
    try:
        yield target
    finally:
        await unmount(target)


async def test_layers_hide_and_replace_as_in_a_container(place: Path) -> None:
    low, high = layer(place, "low"), layer(place, "high")
    for name in ("kept", "replaced", "removed", "emptied/old", "gone/old"):
        write(low / name, "low")
    write(high / "replaced", "high")
    write(high / "emptied/new", "high")
    os.setxattr(high / "emptied", "user.overlay.opaque", b"y")
    for name in ("removed", "gone"):
        hide(high / name)
    await make_root_disk((low, high), place / "disk", 256 * MIB)
    async with mounted(place / "disk") as root:
        assert content(root) == {"kept": "low", "replaced": "high", "emptied/new": "high"}
        assert {path.name for path in root.iterdir()} == {"kept", "replaced", "emptied"}


async def test_metadata_is_that_of_the_image(place: Path) -> None:
    one = layer(place, "one")
    one.chmod(0o711)
    os.chown(one, 3, 4)
    program = write(one / "bin/program", "x" * 10000)
    os.chown(program, 1000, 1001)
    program.chmod(0o4755)
    os.setxattr(program, "security.capability", CAPABILITY)
    os.setxattr(program, "user.note", b"kept")
    os.utime(program, (1_000_000_000, 1_000_000_000))
    (one / "bin/other").hardlink_to(program)
    (one / "link").symlink_to("/nowhere")
    os.mkfifo(one / "fifo", 0o640)
    os.mknod(one / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with (one / "sparse").open("wb") as file:
        file.truncate(4 * GIB)
    await make_root_disk((one,), place / "disk", 256 * MIB)
    async with mounted(place / "disk") as root:
        top, status = root.stat(), (root / "bin/program").stat()
        assert (stat.S_IMODE(top.st_mode), top.st_uid, top.st_gid) == (0o711, 3, 4)
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o4755, 1000, 1001)
        assert (status.st_mtime, status.st_nlink) == (1_000_000_000, 2)
        assert os.getxattr(root / "bin/program", "security.capability") == CAPABILITY
        assert os.getxattr(root / "bin/program", "user.note") == b"kept"
        assert (root / "bin/other").samefile(root / "bin/program")
        assert (root / "link").readlink() == Path("/nowhere")
        assert stat.S_ISFIFO((root / "fifo").stat().st_mode)
        assert (root / "null").stat().st_rdev == os.makedev(1, 3)
        assert (root / "sparse").stat().st_size == 4 * GIB


async def test_whiteouts_of_nothing_hide_nothing_and_show_nowhere(place: Path) -> None:
    """Where only one layer has a directory, the kernel lists its whiteouts, which then cannot be found."""
    low, high = layer(place, "low"), layer(place, "high")
    write(low / "a/b/kept", "low")
    hide(low / "a/b/ghost")
    write(low / "emptied/old", "low")
    write(high / "new/kept", "high")
    for name in ("new/ghost", "emptied/ghost", "ghost"):
        hide(high / name)
    os.setxattr(high / "emptied", "user.overlay.opaque", b"y")
    os.setxattr(low / "a/b", "user.note", b"kept")
    os.chown(low / "a/b", 7, 8)
    (low / "a/b").chmod(0o2750)
    os.utime(low / "a/b", (1_000_000_000, 1_000_000_000))
    await make_root_disk((low, high), place / "disk", 256 * MIB)
    async with mounted(place / "disk") as root:
        assert content(root) == {"a/b/kept": "low", "new/kept": "high"}
        assert list((root / "emptied").iterdir()) == []
        status = (root / "a/b").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o2750, 7, 8)
        assert status.st_mtime == 1_000_000_000
        assert os.getxattr(root / "a/b", "user.note") == b"kept"


async def test_a_root_that_says_it_hides_all_below_still_holds_all(place: Path) -> None:
    """An opaque root directory is nothing that the kernel heeds, so nor may what is mounted over it."""
    low, high = layer(place, "low"), layer(place, "high")
    write(low / "low", "low")
    write(high / "high", "high")
    os.setxattr(high, "user.overlay.opaque", b"y")
    await make_root_disk((low, high), place / "disk", 256 * MIB)
    async with mounted(place / "disk") as root:
        assert content(root) == {"low": "low", "high": "high"}


async def test_the_same_layer_twice_and_no_layer_at_all(place: Path) -> None:
    empty, one = layer(place, "empty"), layer(place, "one")
    write(one / "file", "x")
    await make_root_disk((empty, one, empty), place / "disk", 256 * MIB)
    async with mounted(place / "disk") as root:
        assert content(root) == {"file": "x"}
    await make_root_disk((), place / "disk", 256 * MIB)
    async with mounted(place / "disk") as root:
        assert list(root.iterdir()) == []


async def test_a_lost_and_found_of_the_image_stays(place: Path) -> None:
    one = layer(place, "one")
    write(one / "lost+found/file", "x")
    await make_root_disk((one,), place / "disk", 256 * MIB)
    async with mounted(place / "disk") as root:
        assert content(root) == {"lost+found/file": "x"}


async def test_four_hundred_layers(place: Path) -> None:
    layers = []
    for number in range(400):
        layers.append(layer(place, f"layer-with-a-long-name-{number}"))
        write(layers[-1] / str(number), "x")
    await make_root_disk(tuple(layers), place / "disk", 256 * MIB)
    async with mounted(place / "disk") as root:
        assert len(content(root)) == 400


async def test_it_is_sparse_and_has_room_for_many_small_files(place: Path) -> None:
    one = layer(place, "one")
    for number in range(20_000):
        write(one / str(number % 100) / str(number), "")
    await make_root_disk((one,), place / "disk", 64 * MIB)
    async with mounted(place / "disk") as root:
        assert len(content(root)) == 20_000
        assert os.statvfs(root).f_ffree > 4000
    await make_root_disk((), place / "disk", 10 * GIB)
    assert (place / "disk").stat().st_size == 10 * GIB
    assert (place / "disk").stat().st_blocks * 512 < 8 * MIB


@pytest.mark.parametrize("content_mib", [30, 64])
async def test_an_image_larger_than_its_disk_is_refused_with_both_sizes(place: Path, content_mib: int) -> None:
    """Also one that would fit, were it not for what the filesystem itself takes."""
    one = layer(place, "one")
    (one / "file").write_bytes(os.urandom(content_mib * MIB))
    with pytest.raises(AlveoleError, match=rf"holds {content_mib} MiB in 1 files, the disk 32 MiB") as caught:
        await make_root_disk((one,), place / "disk", 32 * MIB)
    assert caught.value.code is ErrorCode.EXHAUSTED
    assert caught.value.hint
    assert not (place / "disk").exists()


@contextmanager
def full_after(place: Path, size_bytes: int) -> Iterator[Path]:
    """A filesystem with so much room."""
    small = place / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", small], check=True)
    try:
        yield small
    finally:
        subprocess.run(["umount", small], check=True)


async def test_a_full_disk_is_told_as_such_and_keeps_nothing(place: Path) -> None:
    one = layer(place, "one")
    (one / "file").write_bytes(os.urandom(20 * MIB))
    with full_after(place, 16 * MIB) as small:
        with pytest.raises(AlveoleError, match="no space for a root disk") as caught:
            await make_root_disk((one,), small / "disk", GIB)
        assert caught.value.code is ErrorCode.EXHAUSTED
        assert list(small.iterdir()) == []


async def test_what_fails_by_itself_leaves_nothing(place: Path) -> None:
    with pytest.raises(AlveoleError, match="No such file"):
        await make_root_disk((place / "missing",), place / "disk", GIB)
    assert list(place.iterdir()) == []


async def wait_for_child(place: Path) -> int:
    """The process that is making a disk there."""
    while True:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                argv = entry.read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if "-d" in argv and "mke2fs" in argv[0] and (entry.parent / "cwd").readlink().is_relative_to(place):
                return int(entry.parent.name)
        await asyncio.sleep(0.005)


async def test_cancelled_or_killed_nothing_stays_mounted_and_no_process_goes_on(place: Path) -> None:
    one = layer(place, "one")
    (one / "file").write_bytes(os.urandom(200 * MIB))
    making = asyncio.create_task(make_root_disk((one,), place / "disk", GIB))
    child = await wait_for_child(place)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert not Path(f"/proc/{child}").exists()
    assert not (place / "disk").exists()
    making = asyncio.create_task(make_root_disk((one,), place / "disk", GIB))
    os.kill(await wait_for_child(place), signal.SIGKILL)
    with pytest.raises(AlveoleError):
        await making
    assert targets_below(place) == []
    assert not (place / "disk").exists()
