"""Private pages of a process: found, kept, put into another; and a process that ends meanwhile is no endless wait."""

import io
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from alveole.host import pages

pytestmark = pytest.mark.root
SIZE = 1 << 20
WRITES = {0: b"first", 5 * pages.PAGE_BYTES: b"in the middle", SIZE - pages.PAGE_BYTES: b"last"}
_MAPS = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
memory = mmap.mmap(file, int(sys.argv[2]), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for offset, word in eval(sys.argv[3]).items():
    memory[offset:offset + len(word)] = word
print("mapped", flush=True)
for line in sys.stdin:
    print(bytes(memory[:5]), flush=True)
"""


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@contextmanager
def process(memory: Path, writes: dict[int, bytes]) -> Iterator[subprocess.Popen[str]]:
    """One that has mapped the file privately, and written to some pages. It answers a line with its first bytes."""
    argv = [sys.executable, "-c", _MAPS, str(memory), str(SIZE), repr(writes)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made:
        assert made.stdout
        assert made.stdout.readline() == "mapped\n"
        yield made
        end(made)


def end(made: subprocess.Popen[str]) -> None:
    made.send_signal(signal.SIGKILL)
    made.wait()


def save(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    pages.save(*arguments)


def test_what_one_wrote_another_has(monkeypatch: pytest.MonkeyPatch, memory: Path, tmp_path: Path) -> None:
    saved = tmp_path / "pages"
    with process(memory, WRITES) as first:
        save(monkeypatch, first.pid, memory, saved)
    assert saved.stat().st_blocks * 512 == len(WRITES) * pages.PAGE_BYTES
    with saved.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        assert all(content[offset : offset + len(word)] == word for offset, word in WRITES.items())
    with process(memory, {}) as second:
        pages.load(second.pid, memory, saved)
        assert second.communicate("\n")[0] == "b'first'\n"


def test_one_that_ends_while_it_is_read(monkeypatch: pytest.MonkeyPatch, memory: Path, tmp_path: Path) -> None:
    really = os.preadv
    with process(memory, WRITES) as dying:

        def read(*arguments: Any) -> int:
            end(dying)
            return really(*arguments)

        monkeypatch.setattr("alveole.host.pages.os.preadv", read)
        with pytest.raises(OSError, match="the process has ended"):
            save(monkeypatch, dying.pid, memory, tmp_path / "pages")


def test_one_that_ends_while_it_is_written(monkeypatch: pytest.MonkeyPatch, memory: Path, tmp_path: Path) -> None:
    really, saved = os.pwrite, tmp_path / "pages"
    with process(memory, WRITES) as first:
        save(monkeypatch, first.pid, memory, saved)
    with process(memory, {}) as dying:

        def write(*arguments: Any) -> int:
            end(dying)
            return really(*arguments)

        monkeypatch.setattr("alveole.host.pages.os.pwrite", write)
        with pytest.raises(OSError, match="the process has ended"):
            pages.load(dying.pid, memory, saved)
