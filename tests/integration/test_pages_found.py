"""Which pages of a mapping are a process's own."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from alveole.host import pages
from tests.integration.daemon import until

pytestmark = pytest.mark.root

KSM = Path("/sys/kernel/mm/ksm")
PAGE = pages.PAGE_BYTES
MERGEABLE = 12  # MADV_MERGEABLE


@pytest.fixture
def merging() -> Iterator[None]:
    """The kernel merges equal pages of processes that let it; full of zeros, they become its page of zeros."""
    files = [KSM / name for name in ("use_zero_pages", "run")]
    if not all(file.exists() for file in files):
        pytest.skip("this kernel cannot merge pages of zeros")
    before = [file.read_text() for file in files]
    try:
        for file in files:
            file.write_text("1")
        yield
    finally:
        (KSM / "run").write_text("2")  # undo what it did
        for file, text in zip(files, before, strict=True):
            file.write_text(text)


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[tuple[Path, mmap.mmap]]:
    """A private mapping of 64 pages of a file, the first half written to."""
    path = tmp_path / "memory"
    path.write_bytes(b"\xaa" * 64 * PAGE)
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    with mapping:
        mapping[: 32 * PAGE] = bytes(32 * PAGE)
        assert mapping[-1] == 0xAA  # also read, which makes it no private page
        yield path, mapping


def private(path: Path) -> list[tuple[int, int]]:
    """As numbers of pages."""
    start, end = pages.mapping(os.getpid(), path)
    return [((first - start) // PAGE, (last - start) // PAGE) for first, last in pages.private(os.getpid(), start, end)]


def test_what_was_written_is_private(mapped: tuple[Path, mmap.mmap]) -> None:
    assert private(mapped[0]) == [(0, 32)]


@pytest.mark.usefixtures("merging")
def test_pages_that_became_the_kernels_page_of_zeros_are_private(mapped: tuple[Path, mmap.mmap]) -> None:
    """The file has something else there."""
    path, mapping = mapped
    mapping.madvise(MERGEABLE)
    until(lambda: _merged() >= 32, what="merged pages")
    assert private(path) == [(0, 32)]
    assert mapping[: 32 * PAGE] == bytes(32 * PAGE)


def _merged() -> int:
    words = Path("/proc/self/ksm_stat").read_text().split()
    return int(words[words.index("ksm_zero_pages") + 1])
