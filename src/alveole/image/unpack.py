"""The unpacker: ``python -I -m alveole.image.unpack BLOB DIRECTORY PARENT LIMITS``.

Unpacks one layer (tar, plain or with gzip or zstd) into an empty directory from inside a jail, and prints one line of
JSON: a report, or what was refused. It compares nothing with expected digests: the caller does.
"""

import errno
import io
import json
import os
import resource
import signal
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

from alveole.host.jail import die_with, run_jailed, sync_filesystem
from alveole.image.tape import DECOMPRESSION_ERRORS, Limits, Member, RefusedError, Unpacked, decompress
from alveole.image.tree import Tree

_BUFFER_BYTES = 1 << 18
_OPEN_FILES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came out. ``error`` is empty on success."""

    blob_digest: str = ""  # of the blob as it is
    diff_id: str = ""  # of the plain tar
    compression: str = ""  # gzip | zstd | empty
    blob_bytes: int = 0
    unpacked_bytes: int = 0
    complete: bool = False  # whether it has its end marker; without, only a known diff id shows that nothing is missing
    error: str = ""
    no_space: bool = False
    killed_by: str = ""  # a signal's name


def main(arguments: list[str]) -> int:
    blob, directory, parent, limits_json = arguments
    die_with(int(parent))
    limits = Limits(**json.loads(limits_json))
    source = os.open(blob, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.dup2(source, sys.stdin.fileno())
    code = run_jailed(lambda: _report(limits), Path(directory), _resource_limits(limits))
    if code < 0:
        _say(Report(killed_by=signal.Signals(-code).name))
    return max(code, 0)


def _resource_limits(limits: Limits) -> dict[int, int]:
    return {
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }


def _report(limits: Limits) -> int:
    os.umask(0)
    try:
        report = _unpack(limits)
    except DECOMPRESSION_ERRORS as error:
        report = Report(error=f"its compression is damaged: {error}")
    except OSError as error:
        report = Report(error=str(error.strerror or error), no_space=error.errno in {errno.ENOSPC, errno.EDQUOT})
    except (RefusedError, tarfile.TarError) as error:
        report = Report(error=str(error))
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:
        report = Report(error=f"the tar stream is malformed ({type(error).__name__})")
    _say(report)
    return 0


def _say(report: Report) -> None:
    sys.stdout.write(json.dumps(asdict(report)) + "\n")
    sys.stdout.flush()


def _unpack(limits: Limits) -> Report:
    blob = io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False), _BUFFER_BYTES)
    compressed, stream, compression = decompress(blob, limits)
    complete = _extract(stream, limits)
    _drain(stream)
    sync_filesystem()
    return Report(
        blob_digest=compressed.digest,
        diff_id=stream.digest,
        compression=compression,
        blob_bytes=compressed.bytes_read,
        unpacked_bytes=stream.bytes_read,
        complete=complete,
    )


def _extract(stream: Unpacked, limits: Limits) -> bool:
    """Whether the archive's end marker was seen."""
    Member.limits = limits
    tree = Tree(limits)
    archive = tarfile.TarFile(
        fileobj=stream,  # type: ignore[arg-type]
        mode="r",
        tarinfo=Member,
        encoding="utf-8",
        errors="surrogateescape",
    )
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would remember every entry
        tree.place(member, archive)
    tree.finish()
    return stream.bytes_read > archive.offset  # an end marker is read but not counted as an entry


def _drain(stream: Unpacked) -> None:
    """Read the padding after the end marker: it is part of the digest, and nothing may hide in it."""
    while data := stream.read(_BUFFER_BYTES):
        if data.count(0) != len(data):
            raise RefusedError("it has data after its end")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
