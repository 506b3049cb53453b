"""Layers made by an attacker: refused in one line that names the entry, or unpacked inside their own directory."""

import asyncio
import gzip
import io
import os
import signal
import stat
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd

from alveole.image.store import LocalImageStore
from alveole.image.tape import Limits
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.image import ImageContent

pytestmark = pytest.mark.root

Entry = tuple[tarfile.TarInfo, bytes]
OUTSIDE = "/tmp/alveole-test-outside"  # never made: a hostile entry would
FILE_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep
SMALL = Limits(ratio_from_bytes=1 << 20, entries=50, unpacked_bytes=64 << 20, file_bytes=32 << 20)


def entry(name: str, content: bytes = b"", **fields: object) -> Entry:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    for field, value in fields.items():
        setattr(header, field, value)
    return header, content


def link(name: str, target: str, *, hard: bool = False) -> Entry:
    return entry(name, type=tarfile.LNKTYPE if hard else tarfile.SYMTYPE, linkname=target)


def folder(name: str, mtime: int = 0) -> Entry:
    return entry(name, type=tarfile.DIRTYPE, mode=0o755, mtime=mtime)


def tar(*entries: Entry, kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for header, content in entries:
            archive.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def pax(name: str = "victim", **headers: str) -> Entry:
    return entry(name, b"content", pax_headers=headers)


def broken_header(position: int) -> bytes:
    data = bytearray(tar(entry("first", b"x"), entry("second", b"y")))
    data[position : position + 8] = b"\xff" * 8
    return bytes(data)


def long_name_chain(count: int) -> bytes:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5
    return (
        header.tobuf(tarfile.GNU_FORMAT) * 0 + (header.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")) * count
    )


REFUSED: dict[str, tuple[bytes, str]] = {
    "dot-dot": (tar(entry(f"x/../../../../../..{OUTSIDE}", b"x")), r"'\.\.'"),
    "hard-link-dot-dot": (tar(link("h", "../../../../etc/shadow", hard=True)), r"entry 'h'.*'\.\.'"),
    "hard-link-outside": (tar(link("h", "/etc/shadow", hard=True)), r"entry 'h'.*No such file"),
    "hard-link-to-directory": (tar(folder("d"), link("h", "d", hard=True)), r"entry 'h'.*not permitted"),
    "through-dangling-link": (tar(link("a", OUTSIDE), entry("a/x", b"x")), r"entry 'a/x'.*exists"),
    "link-loop": (tar(link("a", "b"), link("b", "a"), entry("a/x", b"x")), r"entry 'a/x'"),
    "block-device": (tar(entry("dev/sda", type=tarfile.BLKTYPE, devmajor=8)), r"entry 'dev/sda'.*device"),
    "character-device": (tar(entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)), r"entry 'null'.*device"),
    "newline": (tar(entry("a\nb")), r"newline"),
    "nul": (tar(pax(path="a\0b")), r"NUL"),
    "nul-in-link": (tar(entry("l", type=tarfile.SYMTYPE, pax_headers={"linkpath": "a\0b"})), r"entry 'l'"),
    "long-part": (tar(entry("a" * 256)), r"longer than 255"),
    "too-deep": (tar(entry("d/" * 200 + "x")), r"too long or too deep"),
    "overlay-attribute": (tar(pax(**{"SCHILY.xattr.user.overlay.opaque": "y"})), r"user\.overlay\.opaque"),
    "trusted-attribute": (tar(pax(**{"SCHILY.xattr.trusted.overlay.redirect": "/"})), r"trusted\.overlay"),
    "huge-header": (tar(pax(comment="x" * (2 << 20))), r"extended header"),
    "negative-size": (tar(pax(size="-512")), r"malformed|negative"),
    "size-is-no-number": (tar(pax(size="many")), r"truncated|malformed|size"),
    "not-a-time": (tar(pax(mtime="nan")), r"entry 'victim'"),
    "time-out-of-range": (tar(pax(mtime="1e300")), r"entry 'victim'"),
    "owner-out-of-range": (tar(entry("x", uid=70000)), r"entry 'x'.*owner 70000"),
    "negative-owner": (tar(entry("x", uid=-1), kind=tarfile.GNU_FORMAT), r"entry 'x'.*owner -1"),
    "root-becomes-link": (tar(link(".", OUTSIDE)), r"root directory"),
    "root-becomes-file": (tar(entry("./", b"x", type=tarfile.CONTTYPE)), r"root directory"),
    "whiteout-of-nothing": (tar(entry("d/.wh.")), r"whiteout of nothing"),
    "whiteout-of-parent": (tar(entry("d/.wh...")), r"whiteout of nothing"),
    "unknown-type": (tar(entry("x", type=b"Z")), r"entry 'x'.*type"),
    "sparse-giant": (
        tar(pax(**{"GNU.sparse.map": "0,7", "GNU.sparse.size": str(1 << 50)})),
        r"entry 'victim'.*size is",
    ),
    "sparse-backwards": (
        tar(pax(**{"GNU.sparse.map": "4096,4,0,3", "GNU.sparse.size": "8192"})),
        r"malformed|backwards",
    ),
    "file-too-large": (entry("big", size=33 << 20)[0].tobuf(), r"entry 'big'.*size is"),
    "too-many-entries": (tar(*(entry(f"f{i}") for i in range(60))), r"more than 50 entries"),
    "broken-header": (broken_header(1024 + 148), r"malformed or truncated"),
    "truncated-content": (tar(entry("x", b"x" * 5000))[:3000], r"entry 'x'.*(unexpected end|truncated)"),
    "truncated-header": (tar(entry("x", b"x"))[: 512 + 512 + 100] + b"y" * 100, r"malformed or truncated"),
    "no-end-marker": (tar(entry("x", b"x"))[:1024], r"truncated"),
    "data-after-end": (tar(entry("x", b"x")) + b"hidden", r"data after its end"),
    "header-chain": (long_name_chain(3000), r"malformed"),
    "no-tar": (b"hello world, this is no archive\n" * 100, r"malformed|truncated|invalid header"),
    "empty": (b"", r"empty"),
    "gzip-bomb": (gzip.compress(tar(entry("zeros", bytes(30 << 20)))), r"200 times"),
    "zstd-bomb": (zstd.compress(tar(entry("zeros", bytes(30 << 20)))), r"200 times"),
    "gzip-truncated": (gzip.compress(tar(entry("x", os.urandom(9000))))[:-4000], r"compression is damaged"),
    "gzip-wrong-checksum": (gzip.compress(tar(entry("x")))[:-8] + bytes(8), r"compression is damaged"),
    "gzip-garbage-after": (gzip.compress(tar(entry("x"))) + b"garbage", r"compression is damaged"),
    "zstd-garbage": (b"\x28\xb5\x2f\xfd" + b"\xff" * 200, r"compression is damaged"),
    "zstd-truncated": (zstd.compress(tar(entry("x", os.urandom(9000))))[:-4000], r"compression is damaged"),
}


@pytest.fixture
async def store(tmp_path: Path) -> LocalImageStore:
    store = LocalImageStore(tmp_path / "store", limits=SMALL, fresh_s=0)
    await store.open()
    return store


def content_of(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


async def unpacked(store: LocalImageStore, tmp_path: Path, data: bytes) -> Path:
    archive = tmp_path / "layer"
    archive.write_bytes(data)
    content: ImageContent = await store.load(archive, "rootfs", lambda _: None)
    return store.layer_directories(content)[0]


@pytest.mark.parametrize("name", REFUSED)
async def test_refuses(name: str, store: LocalImageStore, tmp_path: Path) -> None:
    """One line that names what is wrong; nothing in the store, nothing anywhere else."""
    data, message = REFUSED[name]
    before = content_of(tmp_path / "store")
    with pytest.raises(AlveoleError, match=message) as refusal:
        await unpacked(store, tmp_path, data)
    assert refusal.value.code == ErrorCode.INVALID
    assert "\n" not in refusal.value.message
    assert len(refusal.value.message) < 700
    assert content_of(tmp_path / "store") == before
    assert content_of(tmp_path) == {"layer", "store", *(f"store/{path}" for path in before)}
    assert not Path(OUTSIDE).exists()


async def test_links_resolve_inside_the_layer(store: LocalImageStore, tmp_path: Path) -> None:
    """A directory replaced by a link to the host's /etc: what is written through it lands in the layer's own /etc."""
    marker = "etc/alveole-test-marker"
    root = await unpacked(
        store, tmp_path, tar(folder("etc"), folder("d"), link("d", "/etc"), entry("d/alveole-test-marker", b"x"))
    )
    assert (root / marker).read_bytes() == b"x"
    assert not Path("/", marker).exists()
    assert (root / "d").readlink() == Path("/etc")


async def test_absolute_names_are_inside(store: LocalImageStore, tmp_path: Path) -> None:
    root = await unpacked(store, tmp_path, tar(entry(f"/{OUTSIDE}", b"x"), entry("./a//./b", b"y")))
    assert (root / OUTSIDE.lstrip("/")).read_bytes() == b"x"
    assert (root / "a/b").read_bytes() == b"y"
    assert not Path(OUTSIDE).exists()


async def test_later_entries_replace_earlier_ones(store: LocalImageStore, tmp_path: Path) -> None:
    """Whatever was there: a file, a link (never what it points to), a directory with content."""
    root = await unpacked(
        store,
        tmp_path,
        tar(
            entry("file", b"old"),
            entry("file", b"new"),
            entry("target", b"kept"),
            link("link", "target"),
            entry("link", b"file now"),
            entry("d/below/x", b"x"),
            entry("d", b"file now"),
            entry("f", b"x"),
            folder("f"),
        ),
    )
    assert [(root / name).read_bytes() for name in ("file", "target", "link", "d")] == [
        b"new",
        b"kept",
        b"file now",
        b"file now",
    ]
    assert (root / "f").is_dir()


async def test_hard_links(store: LocalImageStore, tmp_path: Path) -> None:
    """To a file: one inode. To a symbolic link: one more name of the link itself."""
    root = await unpacked(
        store,
        tmp_path,
        tar(entry("a", b"x"), link("b", "a", hard=True), link("s", "/etc/shadow"), link("t", "s", hard=True)),
    )
    assert (root / "a").stat().st_ino == (root / "b").stat().st_ino
    assert (root / "t").is_symlink()
    assert (root / "t").readlink() == Path("/etc/shadow")


async def test_whiteouts_become_what_overlayfs_reads(store: LocalImageStore, tmp_path: Path) -> None:
    """Also around what the same layer holds: that stays, and hides what is below."""
    root = await unpacked(
        store,
        tmp_path,
        tar(
            entry("d/.wh.gone"),
            entry("opaque/.wh..wh..opq"),
            entry("opaque/kept", b"x"),
            entry("own/x", b"x"),
            entry(".wh.own"),
            entry(".wh.later"),
            entry("later/x", b"x"),
            entry(".wh..wh.plnk", b"x"),
            entry("literal", type=tarfile.CHRTYPE),
        ),
    )
    for name in ("d/gone", "literal"):
        status = (root / name).lstat()
        assert stat.S_ISCHR(status.st_mode)
        assert status.st_rdev == 0
    for name in ("opaque", "own", "later"):
        assert os.getxattr(root / name, "user.overlay.opaque") == b"y"
    assert os.listxattr(root / "d") == []
    assert content_of(root) == {"d", "d/gone", "opaque", "opaque/kept", "own", "own/x", "later", "later/x", "literal"}


async def test_overlayfs_understands_the_layers(store: LocalImageStore, tmp_path: Path) -> None:
    """Mounted as instances mount them, the upper layer hides what it should, and only that."""
    below = tar(entry("d/gone", b"x"), entry("d/kept", b"x"), entry("opaque/old", b"x"), entry("again/old", b"x"))
    above = tar(
        entry("d/.wh.gone"),
        entry("opaque/new", b"x"),
        entry("opaque/.wh..wh..opq"),
        entry(".wh.again"),
        folder("again"),
    )
    lower, upper = [await unpacked(store, tmp_path, layer) for layer in (below, above)]
    target = tmp_path / "merged"
    target.mkdir()
    options = f"ro,userxattr,lowerdir={upper}:{lower}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", target], check=True)
    try:
        assert content_of(target) == {"d", "d/kept", "opaque", "opaque/new", "again"}
    finally:
        subprocess.run(["umount", target], check=True)


async def test_metadata_is_kept(store: LocalImageStore, tmp_path: Path) -> None:
    """Owners unshifted, set-user-ID bits, times, capabilities and user attributes; foreign attributes left out."""
    capability = FILE_CAPABILITY.decode("utf-8", "surrogateescape")
    attributes = {
        "SCHILY.xattr.security.capability": capability,
        "SCHILY.xattr.user.note": "n",
        "SCHILY.xattr.security.selinux": "label",
    }
    root = await unpacked(
        store,
        tmp_path,
        tar(
            folder("d", mtime=1000),
            entry("d/su", b"x", mode=0o4755, uid=12, gid=65535, mtime=1234.5, pax_headers=attributes),
            entry("pipe", type=tarfile.FIFOTYPE, mode=0o640),
            entry("sparse", b"content", pax_headers={"GNU.sparse.map": "1048576,7", "GNU.sparse.size": "2097152"}),
        ),
    )
    status = (root / "d/su").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12, 65535, 0o4755)
    assert status.st_mtime_ns == 1_234_500_000_000
    assert (root / "d").stat().st_mtime == 1000
    assert os.getxattr(root / "d/su", "security.capability") == FILE_CAPABILITY
    assert os.getxattr(root / "d/su", "user.note") == b"n"
    assert sorted(os.listxattr(root / "d/su")) == ["security.capability", "user.note"]
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
    assert (root / "sparse").read_bytes() == bytes(1 << 20) + b"content" + bytes((1 << 20) - 7)
    assert (root / "sparse").stat().st_blocks * 512 < 100_000


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd.compress])
async def test_compressions(compress: Callable[[bytes], bytes], store: LocalImageStore, tmp_path: Path) -> None:
    root = await unpacked(store, tmp_path, compress(tar(entry("x", b"content"))))
    assert (root / "x").read_bytes() == b"content"


async def test_the_unpacker_is_confined(store: LocalImageStore, tmp_path: Path) -> None:
    """While it waits for its input, the kernel says it has few capabilities, its own namespaces and root."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    work = asyncio.create_task(store._unpack(store._flights.begin(tmp_path), pipe, "test"))
    writer = await asyncio.to_thread(pipe.open, "wb")
    try:
        child = await _jailed_process()
        status = Path(f"/proc/{child}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert {fields[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"000000008000001b"}
        assert fields["NoNewPrivs"] == "1"
        for namespace in ("user", "mnt", "net", "ipc", "uts", "pid"):
            own = Path(f"/proc/{child}/ns/{namespace}").readlink()
            assert own != Path(f"/proc/self/ns/{namespace}").readlink(), namespace
        assert Path(f"/proc/{child}/root").readlink().is_relative_to(tmp_path)
        assert {path.name for path in Path(f"/proc/{child}/fd").iterdir()} == {"0", "1", "2"}
        os.kill(child, signal.SIGKILL)
        with pytest.raises(AlveoleError, match="ended by SIGKILL"):
            await work
    finally:
        writer.close()


async def _jailed_process() -> int:
    """The unpacker's child, once it has locked itself in: the innermost of this process's descendants."""
    for _ in range(300):
        pid = os.getpid()
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pid = int(children[-1])
        if pid != os.getpid() and "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text():
            return pid
        await asyncio.sleep(0.02)
    pytest.fail("no jailed process appeared")
