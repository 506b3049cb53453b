"""Whether a file may be read as a disk, before any program opens it. Pure.

A qcow2 header may name other files of the host (a backing file, a data file), and sizes that make its reader run out
of memory. What is refused here never reaches qemu-img. A raw disk has no header: what is refused is what surely is
something else.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise

from alveole.model.error import AlveoleError, invalid

HEAD_BYTES = 2 << 20
"""How much of a file has to be given: the largest cluster, as a header and its extensions lie in the first one."""

SECTOR_BYTES = 512
VIRTUAL_SIZE_LIMIT_BYTES = 2 << 40

_MAGIC = b"QFI\xfb"
_V2_BYTES, _V3_BYTES = 72, 104
_CLUSTER_BITS = range(9, 22)
_EXTENDED_L2_CLUSTER_BITS = 14  # at least
_L1_LIMIT_BYTES = 32 << 20  # these limits are QEMU's own
_REFCOUNT_TABLE_LIMIT_BYTES = 8 << 20
_SNAPSHOT_LIMIT = 65536
_SNAPSHOT_BYTES = 40  # of the smallest entry of their table
_REFCOUNT_ORDER_LIMIT = 6
_COMPRESSIONS = (0, 1)  # zlib, zstd

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = range(5)  # bits of incompatible features
_UNDERSTOOD = 1 << _COMPRESSION | 1 << _EXTENDED_L2

_EXTENSIONS_END = 0
_EXTENSIONS_LIMIT = 64  # five kinds are known
_FEATURE_NAMES = 0x6803F857
_FEATURE_NAME_BYTES = 48
_REFUSED_EXTENSIONS = {
    0xE2792ACA: "a backing file's format",
    0x44415441: "the name of a data file",
    0x0537BE77: "an encryption header",
}

_OTHER_FORMATS = (  # what the file is, where its magic lies, the magic
    ("a VMDK image", 0, b"KDMV"),
    ("a VMDK image", 0, b"COWD"),
    ("a VMDK image", 0, b"# Disk DescriptorFile"),
    ("a VHD image", 0, b"conectix"),
    ("a VHDX image", 0, b"vhdxfile"),
    ("a VDI image", 0x40, b"\x7f\x10\xda\xbe"),
    ("a QED image", 0, b"QED\0"),
    ("compressed with gzip", 0, b"\x1f\x8b"),
    ("compressed with xz", 0, b"\xfd7zXZ\0"),
    ("compressed with zstd", 0, b"\x28\xb5\x2f\xfd"),
    ("compressed with bzip2", 0, b"BZh"),
    ("a ZIP archive", 0, b"PK\x03\x04"),
)
_CONVERT = "convert it: qemu-img convert -O qcow2 FILE NEW.qcow2"
_WHOLE = "fetch it again, and compare its checksum"
_CHECK = "on a machine that trusts it: qemu-img check -r all FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    version: int
    backing_offset: int
    backing_bytes: int
    cluster_bits: int
    virtual_bytes: int
    encryption: int
    l1_entries: int
    l1_offset: int
    refcounts_offset: int
    refcounts_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    refcount_order: int = 4
    bytes: int = _V2_BYTES
    compression: int = 0

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l1_entries_needed(self) -> int:
        """One for each table of the second level, which fills a cluster and has an entry for each cluster of data."""
        entry_bytes = 16 if self.incompatible >> _EXTENDED_L2 & 1 else 8
        return -(-self.virtual_bytes // (self.cluster_bytes // entry_bytes * self.cluster_bytes))


def check_qcow2(head: bytes, file_bytes: int, what: str) -> int:
    """The virtual size in bytes, in whole sectors, of a qcow2 file that begins with ``head`` (HEAD_BYTES, or all).

    Raises AlveoleError(INVALID) saying what is wrong with ``what`` (the file's name, for the user) and what to do.
    """
    header = _read_header(head, what)
    _check_header(header, what)
    _check_extensions(header, head, what)
    _check_features(header, head, what)
    _check_tables(header, file_bytes, what)
    return -(-header.virtual_bytes // SECTOR_BYTES) * SECTOR_BYTES


def check_raw(head: bytes, file_bytes: int, what: str) -> int:
    """The size in bytes of a raw disk that begins with ``head``. Raises AlveoleError(INVALID)."""
    if head.startswith(_MAGIC):
        raise invalid(f"{what} is a qcow2 image, not a raw disk", hint="say that its format is qcow2")
    if found := _other_format(head):
        raise _other(found, "a raw disk", what)
    # Nor is a disk one of the documents that describe images of layers: no two contents have one digest.
    if head[:SECTOR_BYTES].lstrip()[:1] == b"{":
        raise invalid(f"{what} is a text, not a raw disk", hint="give the disk itself")
    if file_bytes == 0 or file_bytes % SECTOR_BYTES:
        raise invalid(
            f"{what} has {file_bytes} bytes, which are no whole sectors of {SECTOR_BYTES}: it is cut short", hint=_WHOLE
        )
    _check_virtual_size(file_bytes, what)
    return file_bytes


def _other_format(head: bytes) -> str:
    return next((name for name, offset, magic in _OTHER_FORMATS if head[offset:].startswith(magic)), "")


def _other(found: str, wanted: str, what: str) -> AlveoleError:
    hint = "unpack it first" if found.startswith(("compressed", "a ZIP")) else _CONVERT
    return invalid(f"{what} is {found}, not {wanted}", hint=hint)


def _read_header(head: bytes, what: str) -> _Header:
    if not head.startswith(_MAGIC):
        if found := _other_format(head):
            raise _other(found, "a qcow2 image", what)
        raise invalid(f"{what} is not a qcow2 image", hint="if it is a raw disk, say that its format is raw")
    if len(head) < _V2_BYTES:
        raise _cut_short(what)
    header = _Header(**dict(zip(_V2_FIELDS, struct.unpack_from(">IQIIQIIQQIIQ", head, 4), strict=True)))
    if header.version not in {2, 3}:
        raise invalid(f"{what} is qcow2 of version {header.version}; versions 2 and 3 can be read", hint=_CONVERT)
    return header if header.version == 2 else _read_v3(header, head, what)


_V2_FIELDS = tuple(_Header.__dataclass_fields__)[:12]


def _read_v3(header: _Header, head: bytes, what: str) -> _Header:
    if len(head) < _V3_BYTES:
        raise _cut_short(what)
    incompatible, refcount_order, header_bytes = struct.unpack_from(">Q16xII", head, _V2_BYTES)
    if header_bytes < _V3_BYTES or header_bytes % 8:
        raise invalid(f"{what} is damaged: its header says it has {header_bytes} bytes", hint=_WHOLE)
    if len(head) < header_bytes:
        raise _cut_short(what)
    fields = {name: getattr(header, name) for name in _V2_FIELDS}
    return _Header(
        **fields,
        incompatible=incompatible,
        refcount_order=refcount_order,
        bytes=header_bytes,
        compression=head[_V3_BYTES] if header_bytes > _V3_BYTES else 0,
    )


def _check_header(header: _Header, what: str) -> None:
    if header.backing_offset or header.backing_bytes:
        raise invalid(
            f"{what} is not whole: it continues another image, its backing file",
            hint="make one that stands alone, where that file is: qemu-img convert -O qcow2 FILE NEW.qcow2",
        )
    if header.encryption:
        raise invalid(f"{what} is encrypted", hint="decrypt it first: qemu-img convert with its key")
    if header.cluster_bits not in _CLUSTER_BITS:
        raise invalid(f"{what} is damaged: it has clusters of 2^{header.cluster_bits} bytes", hint=_WHOLE)
    if header.bytes > header.cluster_bytes:
        raise invalid(f"{what} is damaged: its header is larger than a cluster", hint=_WHOLE)
    if header.refcount_order > _REFCOUNT_ORDER_LIMIT:
        raise invalid(f"{what} is damaged: it counts references in 2^{header.refcount_order} bits", hint=_WHOLE)
    _check_virtual_size(header.virtual_bytes, what)


def _check_virtual_size(virtual_bytes: int, what: str) -> None:
    if virtual_bytes == 0:
        raise invalid(f"{what} holds a disk of 0 bytes", hint="give an image of an installed system")
    if virtual_bytes > VIRTUAL_SIZE_LIMIT_BYTES:
        raise invalid(
            f"{what} holds a disk of {virtual_bytes} bytes; at most {VIRTUAL_SIZE_LIMIT_BYTES >> 40} TiB can be used",
            hint="make its disk smaller: qemu-img resize --shrink, after shrinking what is in it",
        )


def _check_features(header: _Header, head: bytes, what: str) -> None:
    features = header.incompatible
    if features >> _DIRTY & 1:
        raise invalid(f"{what} is marked as not closed properly (dirty)", hint=_CHECK)
    if features >> _CORRUPT & 1:
        raise invalid(f"{what} is marked as corrupt", hint=_CHECK)
    if features >> _DATA_FILE & 1:
        raise invalid(f"{what} is not whole: its content is in another file, its data file", hint=_CONVERT)
    if unknown := [bit for bit in range(64) if features & ~_UNDERSTOOD & 1 << bit]:
        names = _feature_names(header, head)
        told = ", ".join(names.get(bit) or f"bit {bit}" for bit in unknown)
        raise invalid(f"{what} needs features that are not known here: {told}", hint=_CONVERT)
    if header.compression not in _COMPRESSIONS:
        raise invalid(f"{what} is compressed by method {header.compression}, which is not known here", hint=_CONVERT)
    if features >> _EXTENDED_L2 & 1 and header.cluster_bits < _EXTENDED_L2_CLUSTER_BITS:
        raise invalid(f"{what} is damaged: its clusters are too small for extended L2 entries", hint=_WHOLE)


def _extensions(header: _Header, head: bytes) -> list[tuple[int, bytes | None]]:
    """Kind and content of each header extension, in order; None as content if that is not all in the first cluster."""
    area = head[: header.cluster_bytes]
    found: list[tuple[int, bytes | None]] = []
    offset = header.bytes
    while offset + 8 <= len(area) and len(found) <= _EXTENSIONS_LIMIT:
        kind, length = struct.unpack_from(">II", area, offset)
        if kind == _EXTENSIONS_END:
            return found
        whole = offset + 8 + length <= len(area)
        found.append((kind, area[offset + 8 : offset + 8 + length] if whole else None))
        if not whole:
            return found
        offset += 8 + (length + 7) // 8 * 8
    return found


def _check_extensions(header: _Header, head: bytes, what: str) -> None:
    found = _extensions(header, head)
    if len(found) > _EXTENSIONS_LIMIT:
        raise invalid(f"{what} is damaged: it has more than {_EXTENSIONS_LIMIT} header extensions", hint=_WHOLE)
    for kind, content in found:
        if kind in _REFUSED_EXTENSIONS:
            raise invalid(
                f"{what} is not whole: it has a header extension with {_REFUSED_EXTENSIONS[kind]}", hint=_CONVERT
            )
        if content is None:
            raise invalid(f"{what} is damaged: a header extension (0x{kind:08x}) is larger than it can be", hint=_WHOLE)


def _feature_names(header: _Header, head: bytes) -> dict[int, str]:
    """What the file itself calls its incompatible features, as far as that can be printed."""
    table = next((content for kind, content in _extensions(header, head) if kind == _FEATURE_NAMES), None) or b""
    starts = pairwise(range(0, len(table) + 1, _FEATURE_NAME_BYTES))
    entries = [table[start:end] for start, end in starts]
    names = {entry[1]: entry[2:].rstrip(b"\0").decode("ascii", "replace") for entry in entries if entry[0] == 0}
    return {bit: name for bit, name in names.items() if name.isprintable()}


def _check_tables(header: _Header, file_bytes: int, what: str) -> None:
    if header.l1_entries < header.l1_entries_needed:
        raise invalid(f"{what} is damaged: its L1 table is too small for its size", hint=_WHOLE)
    if header.snapshots > _SNAPSHOT_LIMIT:
        raise invalid(f"{what} is damaged: it claims to hold {header.snapshots} snapshots", hint=_WHOLE)
    refcounts_bytes = header.refcounts_clusters * header.cluster_bytes
    tables = [
        ("L1 table", header.l1_offset, header.l1_entries * 8, _L1_LIMIT_BYTES),
        ("refcount table", header.refcounts_offset, refcounts_bytes, _REFCOUNT_TABLE_LIMIT_BYTES),
    ]
    if header.snapshots:
        snapshots_bytes = header.snapshots * _SNAPSHOT_BYTES
        tables.append(("snapshot table", header.snapshots_offset, snapshots_bytes, snapshots_bytes))
    for name, offset, length, limit in tables:
        if length > limit or length == 0:
            raise invalid(f"{what} is damaged: its {name} has {length} bytes; 1 to {limit} are possible", hint=_WHOLE)
        if offset == 0 or offset % header.cluster_bytes:
            raise invalid(f"{what} is damaged: its {name} begins at byte {offset}", hint=_WHOLE)
        if offset + length > file_bytes:
            raise _cut_short(what, f"its {name} is beyond its end")


def _cut_short(what: str, why: str = "its header is not complete") -> AlveoleError:
    return invalid(f"{what} is cut short: {why}", hint=_WHOLE)
