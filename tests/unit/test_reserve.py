"""The reserve: space held on the disk of the store, given up when it is full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from alveole.host.reserve import Reserve
from alveole.model.error import AlveoleError, ErrorCode
from alveole.store.base import Put
from alveole.store.sqlite import SqliteStore

SIZE_BYTES = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """8 MiB, apart from the host's."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def _fill(disk: Path) -> Path:
    path = disk / "ballast"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)
    return path


@pytest.mark.root
def test_a_full_disk_refuses_new_things_until_there_is_room(disk: Path) -> None:
    reserve = Reserve(disk / "reserve", SIZE_BYTES)
    reserve.ensure()
    assert (disk / "reserve").stat().st_blocks * 512 == SIZE_BYTES
    ballast = _fill(disk)
    reserve.require()  # the reserve is held: somebody else filled the disk, our own writes have not met that yet
    assert reserve.release()
    assert not reserve.release()
    with pytest.raises(AlveoleError, match="is full") as refused:
        reserve.require()
    assert refused.value.code is ErrorCode.EXHAUSTED
    reserve.ensure()  # no room: nothing happens
    assert not (disk / "reserve").exists()
    ballast.unlink()
    reserve.require()
    reserve.ensure()
    assert (disk / "reserve").exists()


@pytest.mark.root
async def test_the_store_goes_on_by_the_reserve(disk: Path) -> None:
    reserve = Reserve(disk / "reserve", SIZE_BYTES)
    reserve.ensure()
    store = await SqliteStore.open(disk / "store", give_way=reserve.release)
    _fill(disk)
    for number in range(8):
        await store.txn([], [Put(key=f"k{number}", value=bytes(20_000))])
    assert not (disk / "reserve").exists()
    assert len((await store.range("k")).items) == 8
    await store.close()
