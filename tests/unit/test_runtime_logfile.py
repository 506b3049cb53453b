"""Reading conmon's log: joining, tails, times, rotation under a follower, hostile text."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alveole.model.agent import LogLine
from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.logfile import read_log


def record(text: bytes, *, second: int = 0, stream: str = "stdout", tag: str = "F") -> bytes:
    time = f"2026-01-01T00:{second // 60:02}:{second % 60:02}.000000001+00:00"
    return f"{time} {stream} {tag} ".encode() + text + b"\n"


async def read(path: Path, *, tail: int | None = None, since: str | None = None) -> list[LogLine]:
    return [line async for line in read_log(path, follow=False, tail=tail, since=since, finished=lambda: True)]


def texts(lines: list[LogLine]) -> list[str]:
    return [line.line for line in lines]


async def test_a_log_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert await read(tmp_path / "log") == []
    assert await read(tmp_path / "log", tail=3) == []


async def test_pieces_are_joined_apart_for_each_stream(tmp_path: Path) -> None:
    path = tmp_path / "log"
    pieces = [record(b"one ", tag="P"), record(b"error", stream="stderr"), record(b"two"), record(b"rest", tag="P")]
    path.write_bytes(b"".join(pieces))
    assert [(line.stream, line.line, line.partial) for line in await read(path)] == [
        ("stderr", "error", False),
        ("stdout", "one two", False),
        ("stdout", "rest", True),
    ]


async def test_a_line_without_end_is_given_in_bounded_parts(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(record(b"x" * 8192, tag="P") for _ in range(100)))
    lines = await read(path)
    assert max(len(line.line) for line in lines) <= 72 << 10
    assert sum(len(line.line) for line in lines) == 100 * 8192
    assert all(line.partial for line in lines)


@pytest.mark.parametrize(("tail", "expected"), [(0, []), (1, ["9999"]), (3, ["9997", "9998", "9999"])])
async def test_tail_counts_from_the_end_of_a_big_file(tmp_path: Path, tail: int, expected: list[str]) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(record(b"%d" % i) for i in range(10_000)))
    assert texts(await read(path, tail=tail)) == expected


async def test_tail_and_all_cross_rotated_files(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for name, numbers in (("log.10", (0, 1)), ("log.2", (2, 3)), ("log.1", (4, 5)), ("log", (6, 7)), ("log.x", (9,))):
        (tmp_path / name).write_bytes(b"".join(record(b"%d" % i) for i in numbers))
    assert texts(await read(path)) == [str(i) for i in range(8)]
    for tail in range(10):
        assert texts(await read(path, tail=tail)) == [str(i) for i in range(max(0, 8 - tail), 8)]


async def test_since_leaves_out_what_is_older(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(record(b"%d" % i, second=i) for i in range(100)))
    assert texts(await read(path, since="2026-01-01T00:01:37Z")) == ["97", "98", "99"]
    assert texts(await read(path, since="2026-01-01T01:01:38+01:00")) == ["98", "99"]
    with pytest.raises(AlveoleError) as caught:
        await read(path, since="yesterday")
    assert caught.value.code == ErrorCode.INVALID


@given(chunks=st.lists(st.binary(max_size=200).filter(lambda data: b"\n" not in data), max_size=20))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_text_forges_or_breaks_a_record(tmp_path: Path, chunks: list[bytes]) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(record(chunk) for chunk in chunks))
    assert texts(await read(path)) == [chunk.decode(errors="replace") for chunk in chunks]


async def test_what_conmon_did_not_write_whole_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(record(b"one") + b"\x00\xffgarbage\n\n" + record(b"two") + b"2026-01-01T00:00:00.0")
    assert texts(await read(path)) == ["one", "two"]
    assert texts(await read(path, tail=1)) == ["two"]


class Follower:
    def __init__(self, path: Path, finished: Callable[[], bool]) -> None:
        self.lines: list[LogLine] = []
        self._stream = read_log(path, follow=True, tail=None, since=None, finished=finished)
        self.task = asyncio.ensure_future(self._collect())

    async def _collect(self) -> None:
        async for line in self._stream:
            self.lines.append(line)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.lines) < count:  # noqa: ASYNC110  (another task fills it)
                await asyncio.sleep(0.005)


async def test_a_follower_misses_nothing_through_quick_rotations_and_ends(tmp_path: Path) -> None:
    path, ended = tmp_path / "log", asyncio.Event()
    follower = Follower(path, ended.is_set)
    path.write_bytes(record(b"0"))
    await follower.until(1)
    for number in range(1, 4):  # faster than it looks
        for elder in range(4, 0, -1):
            if (older := tmp_path / f"log.{elder}").exists():
                older.rename(tmp_path / f"log.{elder + 1}")
        with path.open("ab") as file:
            path.rename(tmp_path / "log.1")
            file.write(record(b"late %d" % number))
        path.write_bytes(record(b"%d" % number))
    ended.set()
    await asyncio.wait_for(follower.task, 10)
    assert texts(follower.lines) == ["0", "late 1", "1", "late 2", "2", "late 3", "3"]


async def test_a_prompt_without_a_newline_is_shown_while_following(tmp_path: Path) -> None:
    path, ended = tmp_path / "log", asyncio.Event()
    path.write_bytes(record(b"Password: ", tag="P"))
    follower = Follower(path, ended.is_set)
    await follower.until(1)
    assert follower.lines[0].partial
    ended.set()
    await asyncio.wait_for(follower.task, 10)
