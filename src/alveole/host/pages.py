"""The pages of a process that are its own: not those of the file that its memory is mapped from.

Found by PAGEMAP_SCAN (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst), read and written through /proc/PID/mem.
Run as a child of the daemon, since all of that takes time: ``python -I -S pages.py save PID MEMORY FILE`` and
``... load PID MEMORY FILE``. MEMORY is the file that is mapped, FILE a file of the same size that holds nothing but
private pages at their offsets. ``... digest FILE...`` prints the sha256 of each, of its holes only where they are.

``save`` waits for a line of input twice, so that the process need not stand still for what can be done before or after:
first it takes the memory it will need, and prints how much; at the first line, sent when the process stands still,
it reads all pages and prints how much that was; after the second, it writes them.
"""

import ctypes
import fcntl
import json
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

PAGE_BYTES = 4096
_PAGEMAP_SCAN = 0xC0606610
_ARGUMENT = struct.Struct("=12Q")
_REGION = struct.Struct("=3Q")
_REGIONS_AT_ONCE = 8192
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4
_CHUNK_BYTES = 4 << 20
_SPARE = 1.25  # pages that may become private between the two looks


def mapping(pid: int, memory: Path) -> tuple[int, int]:
    """Where a process has mapped a file: start and end. Raises OSError if it has not."""
    status = memory.stat()
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _, offset, device, inode, *_ = line.split()
        major, minor = (int(number, 16) for number in device.split(":"))
        if (major, minor, int(inode)) == wanted and int(offset, 16) == 0:
            start, end = (int(number, 16) for number in span.split("-"))
            return start, end
    raise OSError(f"process {pid} has not mapped {memory}")


def private(pid: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of private pages.

    The kernel's page of zeros is one: it stands where the kernel found a private page full of zeros (KSM).
    """
    vector = ctypes.create_string_buffer(_REGION.size * _REGIONS_AT_ONCE)
    with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
        while start < end:
            argument = bytearray(
                _ARGUMENT.pack(
                    *(_ARGUMENT.size, 0, start, end, 0, ctypes.addressof(vector), _REGIONS_AT_ONCE, 0),
                    *(_FILE, _FILE, _PRESENT | _SWAPPED, _PRESENT),
                )
            )
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
            for index in range(count):
                first, last, _ = _REGION.unpack_from(vector, index * _REGION.size)
                yield first, last
            start = _ARGUMENT.unpack(argument)[4]  # walk_end


def save(pid: int, memory: Path, target: Path) -> None:
    start, end = mapping(pid, memory)
    expected = sum(last - first for first, last in private(pid, start, end))
    buffer = mmap.mmap(-1, max(PAGE_BYTES, int(expected * _SPARE) // PAGE_BYTES * PAGE_BYTES))
    buffer.madvise(mmap.MADV_POPULATE_WRITE if hasattr(mmap, "MADV_POPULATE_WRITE") else 23)
    print(json.dumps({"expected_bytes": expected}), flush=True)
    _await_line()
    runs = list(private(pid, start, end))
    size = sum(last - first for first, last in runs)
    if size > len(buffer):
        buffer.resize(size)
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    view, done = memoryview(buffer), 0
    for first, last in runs:
        ahead = first - done  # of the position in the buffer
        while done + ahead < last:
            done += _some(os.preadv(descriptor, [view[done : last - ahead]], done + ahead))
    os.close(descriptor)
    print(json.dumps({"private_bytes": size}), flush=True)
    _await_line()
    _write(target, view, [(first - start, last - start) for first, last in runs], end - start)


def _write(target: Path, view: memoryview, runs: list[tuple[int, int]], size: int) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        done = 0
        for first, last in runs:
            ahead = first - done  # of the position in the buffer
            while done + ahead < last:
                done += os.pwrite(descriptor, view[done : last - ahead], done + ahead)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(pid: int, memory: Path, source: Path) -> None:
    """Put the pages of a file where the process has mapped ``memory``."""
    start, _ = mapping(pid, memory)
    file = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    target = os.open(f"/proc/{pid}/mem", os.O_WRONLY | os.O_CLOEXEC)
    for first, last in _data(file):
        position = first
        while position < last:
            chunk = os.pread(file, min(_CHUNK_BYTES, last - position), position)
            position += _some(os.pwrite(target, chunk, start + position))


def _some(count: int) -> int:
    """Bytes read or written: none, if the process has ended meanwhile."""
    if not count:
        raise OSError("the process has ended")
    return count


def digest(*paths: Path) -> None:
    for path in paths:
        found = sha256(str(path.stat().st_size).encode())
        with path.open("rb") as file:
            for first, last in _data(file.fileno()):
                found.update(f" {first} {last} ".encode())
                for position in range(first, last, _CHUNK_BYTES):
                    found.update(os.pread(file.fileno(), min(_CHUNK_BYTES, last - position), position))
        print(found.hexdigest())


def _data(file: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each part of a sparse file that is no hole."""
    end, position = os.fstat(file).st_size, 0
    while position < end:
        try:
            first = os.lseek(file, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        position = os.lseek(file, first, os.SEEK_HOLE)
        yield first, position


def _await_line() -> None:
    if not sys.stdin.readline():
        sys.exit("the daemon has ended")


if __name__ == "__main__":
    if sys.argv[1] == "digest":
        digest(*map(Path, sys.argv[2:]))
    else:
        {"save": save, "load": load}[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
