"""Reading an instance's log as conmon writes it: ``TIME STREAM P|F TEXT``, in LOG and its elders LOG.1, LOG.2 ...

P marks a piece of a line that goes on; pieces are joined up to ``_LINE_LIMIT_BYTES``. The text is whatever the
instance wrote; the frame is conmon's, so that no text can forge a record. Files are read in a thread, piece by piece.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from io import BufferedReader
from pathlib import Path
from typing import Literal, NamedTuple

from alveole.host.blocking import in_thread
from alveole.model.agent import LogLine
from alveole.model.error import invalid

_BLOCK_BYTES = 64 << 10
_LINE_LIMIT_BYTES = 64 << 10
_POLL_S = 0.1
_RECORD = re.compile(rb"(\S{20,40}) (stdout|stderr) ([PF]) (.*)", re.DOTALL)


class _Record(NamedTuple):
    time: str
    stream: Literal["stdout", "stderr"]
    whole: bool
    text: bytes


async def read_log(
    path: Path, *, follow: bool, tail: int | None, since: str | None, finished: Callable[[], bool]
) -> AsyncIterator[LogLine]:
    """Lines, oldest first: the last ``tail`` of them, none before ``since`` (RFC 3339).

    With ``follow``, goes on through rotations until ``finished()`` and all that was written by then is read.
    Raises AlveoleError(INVALID) if ``since`` is not a time.
    """
    earliest = None if since is None else _moment(since)
    joiner = _Joiner()
    async for records in _batches(path, follow=follow, tail=tail, finished=finished):
        for record in records:
            if earliest is None or datetime.fromisoformat(record.time) >= earliest:
                for line in joiner.add(record):
                    yield line
        if not records:  # quiet: show a prompt that ends without a newline
            for line in joiner.flush():
                yield line
    for line in joiner.flush():
        yield line


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise invalid(f"{text!r} is not a time", hint="write it as 2026-01-31T12:00:00Z", field="since") from error
    return moment if moment.tzinfo else moment.astimezone()


@dataclass(slots=True)
class _Joiner:
    """Joins the pieces of a line, apart for each stream."""

    _pieces: dict[str, list[_Record]] = field(default_factory=dict)
    _bytes: dict[str, int] = field(default_factory=dict)

    def add(self, record: _Record) -> Iterator[LogLine]:
        self._pieces.setdefault(record.stream, []).append(record)
        self._bytes[record.stream] = self._bytes.get(record.stream, 0) + len(record.text)
        if record.whole or self._bytes[record.stream] >= _LINE_LIMIT_BYTES:
            yield self._take(record.stream, partial=not record.whole)

    def flush(self) -> Iterator[LogLine]:
        for stream in tuple(self._pieces):
            yield self._take(stream, partial=True)

    def _take(self, stream: str, *, partial: bool) -> LogLine:
        pieces = self._pieces.pop(stream)
        del self._bytes[stream]
        text = b"".join(piece.text for piece in pieces).decode(errors="replace")
        return LogLine(time=pieces[0].time, stream=pieces[0].stream, line=text, partial=partial)


async def _batches(
    path: Path, *, follow: bool, tail: int | None, finished: Callable[[], bool]
) -> AsyncIterator[list[_Record]]:
    """Records as they are read; an empty batch whenever there is nothing more for now."""
    cursor = await in_thread(lambda: _Cursor.open(path, tail))
    try:
        while True:
            last_look = not follow or finished()  # asked before reading: what was written until then is read
            while records := await in_thread(cursor.read):
                yield records
            if last_look:
                return
            yield []
            await asyncio.sleep(_POLL_S)
    finally:
        cursor.close()


class _Cursor:
    """A place in a log that is rotated meanwhile: files are known by inode, not by name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BufferedReader | None = None
        self._rest = b""

    @classmethod
    def open(cls, path: Path, tail: int | None) -> "_Cursor":
        """At the beginning of the oldest file, or ``tail`` lines before the end of the newest."""
        cursor = cls(path)
        files = _files(path)
        if tail is None:
            cursor._file = _open(files[0]) if files else None
            return cursor
        wanted = tail
        for file_path in reversed(files):
            cursor.close()
            if (file := _open(file_path)) is None:
                continue
            cursor._file = file
            wanted = _seek_back(file, wanted)
            if wanted <= 0:
                break
        return cursor

    def close(self) -> None:
        if self._file:
            self._file.close()

    def read(self) -> list[_Record]:
        """The next records, empty at the end of the newest file."""
        if self._file is None:
            self._file = _open(self._path)
        while self._file:
            while block := self._file.read(_BLOCK_BYTES):
                *lines, self._rest = (self._rest + block).split(b"\n")
                if records := [record for line in lines if (record := _parse(line))]:
                    return records
            if (newer := self._newer()) is None:
                return []
            if late := self._file.read(_BLOCK_BYTES):  # written between the last read and the rotation
                self._file.seek(-len(late), os.SEEK_CUR)
                newer.close()
                continue
            self.close()
            self._file, self._rest = newer, b""
        return []

    def _newer(self) -> BufferedReader | None:
        """The file that follows the one being read, if that was rotated away."""
        assert self._file is not None  # noqa: S101  (its caller reads it)
        here = os.fstat(self._file.fileno())
        newer: BufferedReader | None = None
        for path in reversed(_files(self._path)):
            file = _open(path)
            if file is None:
                continue
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) == (here.st_dev, here.st_ino):
                file.close()
                return newer
            if newer:
                newer.close()
            newer = file
        return newer  # ours was removed: go on with the oldest left


def _files(path: Path) -> list[Path]:
    """The log and its elders, oldest first."""
    elders = [
        (int(other.suffix[1:]), other) for other in path.parent.glob(f"{path.name}.*") if other.suffix[1:].isdigit()
    ]
    return [*(elder for _, elder in sorted(elders, reverse=True)), *([path] if path.exists() else [])]


def _open(path: Path) -> BufferedReader | None:
    try:
        return path.open("rb")
    except FileNotFoundError:  # rotated away meanwhile
        return None


def _parse(line: bytes) -> _Record | None:
    """None for what conmon did not write whole: the disk was full."""
    match = _RECORD.fullmatch(line)
    if not match:
        return None
    time, stream, tag, text = match.groups()
    return _Record(time.decode(errors="replace"), "stdout" if stream == b"stdout" else "stderr", tag == b"F", text)


def _seek_back(file: BufferedReader, wanted: int) -> int:
    """Go to the beginning of the ``wanted`` last lines of a file. Returns how many it lacks."""
    found, start = 0, file.seek(0, os.SEEK_END)
    for offset, line in _lines_backwards(file):
        record = _parse(line)
        if record and (record.whole or not found):  # the newest may still lack its end
            if found >= wanted:
                break
            found += 1
        start = offset
    file.seek(start)
    return wanted - found


def _lines_backwards(file: BufferedReader) -> Iterator[tuple[int, bytes]]:
    """(offset, line), the last first."""
    position, rest = file.seek(0, os.SEEK_END), b""
    while position > 0:
        step = min(_BLOCK_BYTES, position)
        position -= step
        file.seek(position)
        block = file.read(step) + rest
        rest, *lines = block.split(b"\n")
        offset = position + len(block)
        for line in reversed(lines):
            offset -= len(line)
            yield offset, line
            offset -= 1
    yield 0, rest
