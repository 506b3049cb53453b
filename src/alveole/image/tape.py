"""Reading a layer: decompression, hashes, and a tar parser that is told its limits.

Used by the jailed unpacker only: it imports nothing heavy.
"""

import gzip
import hashlib
import io
import sys
import tarfile
import zlib
from dataclasses import dataclass
from typing import Protocol, Self

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_CHUNK_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
DECOMPRESSION_ERRORS: tuple[type[Exception], ...] = (zlib.error, zstd.ZstdError, gzip.BadGzipFile, EOFError)
_END_OF_ARCHIVE = (tarfile.EOFHeaderError, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]
_EXTENDED_HEADERS = frozenset(
    [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a layer may ask for. Generous for real images, deadly for bombs."""

    unpacked_bytes: int = 64 << 30
    file_bytes: int = 32 << 30  # the size a file shows, holes counted
    entries: int = 2_000_000
    path_bytes: int = 4095
    path_depth: int = 128
    header_bytes: int = 1 << 20  # of one extended header
    ratio: int = 200  # unpacked to compressed, once ratio_from_bytes are unpacked
    ratio_from_bytes: int = 256 << 20
    cpu_s: int = 3600
    memory_bytes: int = 1 << 30


class RefusedError(Exception):
    """The layer is malformed or asks for too much. The text is shown to the user."""


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class Measured:
    """A stream that can only be read forward, and counts and hashes what passes.

    ``tell`` and a forward ``seek`` are what tarfile needs to skip.
    """

    def __init__(self, source: _Readable) -> None:
        self._source = source
        self._sha256 = hashlib.sha256()
        self.bytes_read = 0

    @property
    def digest(self) -> str:
        """Of everything read until now."""
        return f"sha256:{self._sha256.hexdigest()}"

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self.bytes_read += len(data)
        self._sha256.update(data)
        return data

    def seekable(self) -> bool:
        return True  # forward

    def tell(self) -> int:
        return self.bytes_read

    def seek(self, position: int) -> int:
        if position < self.bytes_read:
            raise RefusedError("the tar stream is malformed: it points backwards")
        while missing := position - self.bytes_read:
            if not self.read(min(missing, _CHUNK_BYTES)):
                raise RefusedError("the tar stream is truncated")
        return position


class Unpacked(Measured):
    """The decompressed stream; it ends with RefusedError when it grows beyond the limits."""

    def __init__(self, source: _Readable, compressed: Measured, limits: Limits) -> None:
        super().__init__(source)
        self._compressed = compressed
        self._limits = limits

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        if self.bytes_read > self._limits.unpacked_bytes:
            raise RefusedError(f"it unpacks to more than {self._limits.unpacked_bytes} bytes")
        if self.bytes_read > max(self._limits.ratio_from_bytes, self._limits.ratio * self._compressed.bytes_read):
            raise RefusedError(f"it unpacks to more than {self._limits.ratio} times its compressed size")
        return data


def decompress(blob: "io.BufferedReader[io.FileIO]", limits: Limits) -> tuple[Measured, Unpacked, str]:
    """(compressed stream, decompressed stream, ``gzip`` | ``zstd`` | empty), told by its first bytes."""
    magic = blob.peek(4)[:4]
    compressed = Measured(blob)
    if magic.startswith(_GZIP_MAGIC):
        return compressed, Unpacked(gzip.GzipFile(fileobj=compressed), compressed, limits), "gzip"
    if magic == _ZSTD_MAGIC:
        return compressed, Unpacked(zstd.ZstdFile(compressed), compressed, limits), "zstd"  # type: ignore[call-overload]
    return compressed, Unpacked(compressed, compressed, limits), ""


class Member(tarfile.TarInfo):
    """A header that is refused when broken: by itself tarfile takes a broken header for the end of the archive."""

    limits = Limits()

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except _END_OF_ARCHIVE:
            raise
        except tarfile.HeaderError as error:
            raise RefusedError(f"the tar stream is malformed or truncated: {error}") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """Called by tarfile for every header before it reads what belongs to it."""
        if self.size < 0:
            raise RefusedError(f"entry {self.name!r} has a negative size")
        if self.type in _EXTENDED_HEADERS and self.size > self.limits.header_bytes:
            raise RefusedError(f"an extended header has {self.size} bytes; {self.limits.header_bytes} are allowed")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]
