"""What may be read as a disk: headers of qcow2, and what is no raw disk. Nothing here opens a file."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.image.qcow2 import HEAD_BYTES, check_qcow2, check_raw
from alveole.model.error import AlveoleError, ErrorCode

NAME = "/srv/some.img"
GIB = 1 << 30
BACKING_FORMAT, DATA_FILE_NAME, ENCRYPTION, BITMAPS, FEATURES = (
    0xE2792ACA,
    0x44415441,
    0x0537BE77,
    0x23852875,
    0x6803F857,
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """A header as qemu-img writes it, and a file of ``file_bytes`` behind it."""

    version: int = 3
    backing_offset: int = 0
    backing_bytes: int = 0
    cluster_bits: int = 16
    virtual_bytes: int = 10 * GIB
    encryption: int = 0
    l1_entries: int = 20
    l1_offset: int = 3 << 16
    refcounts_offset: int = 1 << 16
    refcounts_clusters: int = 1
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    refcount_order: int = 4
    header_bytes: int = 112
    compression: int = 0
    extensions: tuple[tuple[int, bytes], ...] = ()
    tail: bytes = b""
    file_bytes: int = 1 << 20

    @property
    def head(self) -> bytes:
        fields = [
            *(self.version, self.backing_offset, self.backing_bytes, self.cluster_bits, self.virtual_bytes),
            *(self.encryption, self.l1_entries, self.l1_offset, self.refcounts_offset, self.refcounts_clusters),
            *(self.snapshots, self.snapshots_offset),
        ]
        data = b"QFI\xfb" + struct.pack(">IQIIQIIQQIIQ", *fields)
        if self.version == 3:
            data += struct.pack(">QQQII", self.incompatible, 0, 0, self.refcount_order, self.header_bytes)
            data += bytes([self.compression]).ljust(min(1 << 16, max(0, self.header_bytes - len(data))), b"\0")
        for kind, content in self.extensions:
            data += struct.pack(">II", kind, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0")
        return (data + bytes(8) + self.tail).ljust(1 << 16, b"\0")


LARGEST: dict[str, Any] = {
    "virtual_bytes": 2 << 40,
    "cluster_bits": 21,
    "l1_entries": 4,
    "l1_offset": 3 << 21,
    "refcounts_offset": 1 << 21,
    "file_bytes": 8 << 21,
}


def check(header: Header) -> int:
    return check_qcow2(header.head, header.file_bytes, NAME)


def accepted(check_as: Callable[..., int], *arguments: object) -> int | None:
    """The size, or None if it is refused; any other failure is one of the test."""
    try:
        return check_as(*arguments)
    except AlveoleError as error:
        if error.code != ErrorCode.INVALID:
            raise
        return None


def feature_names(*names: tuple[int, bytes]) -> tuple[int, bytes]:
    return FEATURES, b"".join(bytes([0, bit]) + name.ljust(46, b"\0") for bit, name in names)


@pytest.mark.parametrize(
    "header",
    [
        Header(),
        Header(version=2),
        Header(header_bytes=104),
        replace(Header(), **LARGEST),
        Header(incompatible=1 << 3, compression=1),
        Header(incompatible=1 << 4, l1_entries=40),
        Header(snapshots=2, snapshots_offset=1 << 16),
        Header(extensions=(feature_names((0, b"dirty bit")), (BITMAPS, bytes(24)), (0x12345678, b"of tomorrow"))),
    ],
)  # fmt: skip
def test_accepted(header: Header) -> None:
    assert check(header) == header.virtual_bytes


def test_whole_sectors() -> None:
    assert check(Header(virtual_bytes=1000)) == 1024


HOSTILE = {
    "a backing file": (Header(backing_offset=512, backing_bytes=11, tail=b"/etc/shadow"), "its backing file"),
    "a backing file of version 2": (Header(version=2, backing_offset=512, backing_bytes=11), "its backing file"),
    "a backing file by a json: name": (
        Header(backing_offset=512, backing_bytes=60, tail=b'json:{"driver":"file","filename":"/etc/shadow"}'),
        "its backing file",
    ),
    "a backing file's length alone": (Header(backing_bytes=11), "its backing file"),
    "a backing file's format": (Header(extensions=((BACKING_FORMAT, b"raw"),)), "a backing file's format"),
    "the same in version 2": (Header(version=2, extensions=((BACKING_FORMAT, b"raw"),)), "a backing file's format"),
    "a data file": (Header(incompatible=1 << 2), "its data file"),
    "a data file's name": (Header(extensions=((DATA_FILE_NAME, b"/etc/shadow"),)), "name of a data file"),
    "the same behind others": (
        Header(extensions=((BITMAPS, bytes(24)), (7, b"x" * 13), (DATA_FILE_NAME, b"/etc/shadow"))),
        "name of a data file",
    ),
    "a data file's name that is cut": (
        Header(extensions=((7, bytes((1 << 16) - 112 - 8 - 8 - 8)), (DATA_FILE_NAME, b"/etc/shadow" * 9))),
        "name of a data file",
    ),
    "AES": (Header(encryption=1), "encrypted"),
    "LUKS": (Header(encryption=2), "encrypted"),
    "an encryption header": (Header(extensions=((ENCRYPTION, bytes(16)),)), "an encryption header"),
    "dirty": (Header(incompatible=1), "not closed properly"),
    "corrupt": (Header(incompatible=2), "corrupt"),
    "an unknown feature": (Header(incompatible=1 << 40), "bit 40"),
    "an unknown feature with a name": (
        Header(incompatible=1 << 5 | 1 << 63, extensions=(feature_names((5, b"zoned storage")),)),
        "zoned storage, bit 63",
    ),
    "a name to spoil the terminal": (
        Header(incompatible=1 << 5, extensions=(feature_names((5, b"\x1b[2Jgone")),)),
        "known here: bit 5",
    ),
    "an unknown compression": (Header(compression=2), "method 2"),
    "extended entries in small clusters": (
        Header(incompatible=1 << 4, cluster_bits=12, virtual_bytes=1 << 20, l1_entries=9),
        "too small for extended L2",
    ),
    "version 1": (Header(version=1), "version 1"),
    "version 4": (Header(version=4), "version 4"),
    "small clusters": (Header(cluster_bits=8), r"2\^8"),
    "large clusters": (Header(cluster_bits=22), r"2\^22"),
    "clusters beyond numbers": (Header(cluster_bits=0xFFFFFFFF), r"2\^4294967295"),
    "nothing in it": (Header(virtual_bytes=0), "0 bytes"),
    "too large": (Header(virtual_bytes=(2 << 40) + 512), "at most 2 TiB"),
    "as large as a number can say": (Header(virtual_bytes=(1 << 64) - 1), "at most 2 TiB"),
    "a huge L1 table": (Header(l1_entries=0xFFFFFFFF), "L1 table has"),
    "a small L1 table": (Header(l1_entries=19), "L1 table is too small"),
    "no L1 table": (Header(l1_offset=0), "L1 table begins at byte 0"),
    "a crooked L1 table": (Header(l1_offset=(3 << 16) + 8), "L1 table begins at"),
    "an L1 table elsewhere": (Header(l1_offset=1 << 62), "L1 table is beyond its end"),
    "an L1 table cut short": (Header(file_bytes=(3 << 16) + 159), "L1 table is beyond its end"),
    "small clusters and a large disk": (
        Header(cluster_bits=9, virtual_bytes=2 << 40, l1_entries=1 << 26, l1_offset=512, file_bytes=1 << 40),
        "L1 table has",
    ),
    "a huge refcount table": (Header(refcounts_clusters=0xFFFFFFFF), "refcount table has"),
    "no refcount table": (Header(refcounts_clusters=0), "refcount table has 0 bytes"),
    "a refcount table in the header": (Header(refcounts_offset=0), "refcount table begins"),
    "a refcount table elsewhere": (Header(refcounts_offset=1 << 50), "refcount table is beyond"),
    "refcounts of 128 bits": (Header(refcount_order=7), r"2\^7"),
    "many snapshots": (Header(snapshots=0xFFFFFFFF, snapshots_offset=1 << 16), "4294967295 snapshots"),
    "snapshots elsewhere": (Header(snapshots=1, snapshots_offset=1 << 40), "snapshot table is beyond"),
    "a short header": (Header(header_bytes=96), "96 bytes"),
    "a crooked header": (Header(header_bytes=113), "113 bytes"),
    "an endless header": (Header(header_bytes=0xFFFFFFF8), "larger than a cluster|cut short"),
    "a header larger than a cluster": (
        Header(cluster_bits=9, header_bytes=1024, virtual_bytes=1 << 20, l1_entries=32),
        "larger than a cluster",
    ),
    "an endless extension": (Header(extensions=((7, bytes(1 << 16)),)), "0x00000007"),
    "endless extensions": (Header(extensions=((7, b""),) * 1000), "more than 64 header extensions"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "told"), HOSTILE.values(), ids=HOSTILE)
def test_refused(header: Header, told: str) -> None:
    """Each says which file, what is wrong with it, and what to do."""
    with pytest.raises(AlveoleError, match=told) as error:
        check(header)
    assert error.value.code == ErrorCode.INVALID
    assert error.value.message.startswith(NAME)
    assert error.value.hint
    assert error.value.message.isprintable()


@pytest.mark.parametrize("length", [4, 20, 71, 72, 100, 103, 111])
def test_truncated(length: int) -> None:
    with pytest.raises(AlveoleError, match=f"{NAME} is cut short"):
        check_qcow2(Header().head[:length], length, NAME)


OTHERS = {
    "VMDK": b"KDMV\1\0\0\0",
    "VMDK, its text": b"# Disk DescriptorFile\nversion=1\n",
    "VHD": b"conectix" + bytes(504),
    "VHDX": b"vhdxfile",
    "VDI": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(0x40, b"\0") + b"\x7f\x10\xda\xbe",
    "QED": b"QED\0",
    "gzip": b"\x1f\x8b\x08",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh9",
    "ZIP": b"PK\x03\x04",
}


@pytest.mark.parametrize("head", OTHERS.values(), ids=OTHERS)
def test_other_formats_are_named(head: bytes, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id.partition(",")[0]
    for check_as in (check_qcow2, check_raw):
        with pytest.raises(AlveoleError, match=name) as error:
            check_as(head.ljust(4096, b"\0"), 4096, NAME)
        assert error.value.hint


def test_raw() -> None:
    assert check_raw(bytes(512), 512, NAME) == 512
    assert check_raw(bytes(512), 2 << 40, NAME) == 2 << 40


@pytest.mark.parametrize(
    ("head", "file_bytes", "told"),
    [
        (Header().head, 1 << 20, "is a qcow2 image, not a raw disk"),
        (b"", 0, "no whole sectors"),
        (bytes(100), 1000, "no whole sectors"),
        (bytes(512), (2 << 40) + 512, "at most 2 TiB"),
        (b'{"schemaVersion":2}'.ljust(512), 512, "a text"),
        (b'\n\t {"schemaVersion":2}'.ljust(512), 512, "a text"),
    ],
)
def test_no_raw_disk(head: bytes, file_bytes: int, told: str) -> None:
    with pytest.raises(AlveoleError, match=told) as error:
        check_raw(head, file_bytes, NAME)
    assert error.value.code == ErrorCode.INVALID


def test_raw_given_as_qcow2() -> None:
    with pytest.raises(AlveoleError, match="is not a qcow2 image") as error:
        check_qcow2(bytes(4096), 4096, NAME)
    assert "raw" in error.value.hint


NUMBERS_32 = st.integers(0, (1 << 32) - 1) | st.integers(0, 64)
NUMBERS_64 = st.integers(0, (1 << 64) - 1) | st.integers(0, 32).map(lambda bit: 1 << bit) | st.just(0)


def changed(changes: dict[str, Any]) -> Header:
    return replace(Header(), **changes)


HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "version": st.sampled_from([1, 2, 3, 4]),
        "backing_offset": NUMBERS_64,
        "backing_bytes": NUMBERS_32,
        "cluster_bits": st.integers(8, 22) | NUMBERS_32,
        "virtual_bytes": NUMBERS_64,
        "encryption": st.integers(0, 3),
        "l1_entries": NUMBERS_32,
        "l1_offset": NUMBERS_64,
        "refcounts_offset": NUMBERS_64,
        "refcounts_clusters": NUMBERS_32,
        "snapshots": NUMBERS_32,
        "snapshots_offset": NUMBERS_64,
        "incompatible": NUMBERS_64,
        "refcount_order": st.integers(0, 8) | NUMBERS_32,
        "header_bytes": st.sampled_from([104, 112, 120]),
        "compression": st.integers(0, 3),
        "extensions": st.lists(
            st.tuples(
                st.sampled_from([BACKING_FORMAT, DATA_FILE_NAME, ENCRYPTION, BITMAPS, FEATURES]) | NUMBERS_32,
                st.binary(max_size=96),
            ),
            max_size=3,
        ).map(tuple),
        "file_bytes": NUMBERS_64,
    },
).map(changed)


@given(HEADERS)
def test_whatever_is_accepted_stands_alone_and_is_bounded(header: Header) -> None:
    virtual_bytes = accepted(check, header)
    if virtual_bytes is None:
        return
    assert 0 < virtual_bytes <= 2 << 40
    assert virtual_bytes % 512 == 0
    assert header.backing_offset == header.backing_bytes == 0
    assert header.version == 2 or header.incompatible & ~0b11000 == 0
    assert 9 <= header.cluster_bits <= 21
    assert header.l1_entries <= 4 << 20
    assert header.l1_offset + header.l1_entries * 8 <= header.file_bytes
    assert header.refcounts_offset + (header.refcounts_clusters << header.cluster_bits) <= header.file_bytes
    stated = [kind for kind, _ in header.extensions]
    read = stated[: stated.index(0)] if 0 in stated else stated
    assert not {BACKING_FORMAT, DATA_FILE_NAME, ENCRYPTION} & set(read)


@given(st.binary(max_size=300), st.integers(0, 1 << 45), st.booleans())
def test_any_bytes(data: bytes, file_bytes: int, magic: bool) -> None:
    """Nothing but a refusal, whatever the file is."""
    for check_as in (check_qcow2, check_raw):
        size = accepted(check_as, b"QFI\xfb" + data if magic else data, file_bytes, NAME)
        assert size is None or 0 < size <= 2 << 40


@given(st.integers(0, 111), st.binary(min_size=1, max_size=8))
def test_damaged(offset: int, damage: bytes) -> None:
    """A sound header with some bytes overwritten is refused, or its numbers are still possible."""
    head = bytearray(Header().head)
    head[offset : offset + len(damage)] = damage
    size = accepted(check_qcow2, bytes(head), 1 << 20, NAME)
    assert size is None or 0 < size <= 2 << 40


def test_extensions_are_read_in_the_first_cluster_only() -> None:
    """QEMU does not look further, and neither may this: what lies there is data."""
    header = Header(cluster_bits=9, virtual_bytes=1 << 20, l1_entries=32)
    padding = (7, bytes(512 - 112 - 8))
    assert check(replace(header, extensions=(padding, (DATA_FILE_NAME, b"x")))) == 1 << 20
    assert len(header.head) <= HEAD_BYTES
