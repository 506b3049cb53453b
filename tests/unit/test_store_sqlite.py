"""What only the SQLite store promises: durability, exclusive ownership, and clear errors when its file fails it."""

import asyncio
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from alveole.model.error import AlveoleError, ErrorCode
from alveole.store.base import MAX_REQUEST_BYTES, Delete, Put
from alveole.store.sqlite import SqliteStore
from alveole.store.sqlite_open import SCHEMA_VERSION

_LARGE = b"v" * (MAX_REQUEST_BYTES // 2)
_LARGE_PAGE = 60  # of a file that holds little else, a page in the middle of the large value


async def put(store: SqliteStore, key: str, value: bytes = b"v", lease: int = 0) -> None:
    await store.txn([], [Put(key=key, value=value, lease=lease)])


async def refused_open(path: Path, code: ErrorCode) -> AlveoleError:
    with pytest.raises(AlveoleError) as caught:
        await SqliteStore.open(path)
    assert caught.value.code is code
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value


async def code_of(write: asyncio.Future[None] | asyncio.Task[None]) -> ErrorCode | None:
    try:
        await write
    except AlveoleError as error:
        return error.code
    return None


# --- durability -----------------------------------------------------------------------------------------------------


async def test_everything_is_there_after_close_and_open(tmp_path: Path) -> None:
    """Values, id, revisions, history and compaction survive."""
    store = await SqliteStore.open(tmp_path / "store")
    await put(store, "a", b"1")
    await put(store, "a", b"2")
    await put(store, "b")
    await store.txn([], [Delete(key="b")])
    await store.compact(3)
    before = store.id, await store.get("a"), await store.range("", revision=4)
    await store.close()
    store = await SqliteStore.open(tmp_path / "store")
    assert (store.id, await store.get("a"), await store.range("", revision=4)) == before
    with pytest.raises(AlveoleError, match="compacted"):
        await store.range("", revision=2)
    await put(store, "c")
    assert (await store.range("")).revision == 6
    await store.close()


async def test_leases_survive_and_their_time_begins_anew(tmp_path: Path) -> None:
    now_s = [100.0]
    store = await SqliteStore.open(tmp_path / "store", lambda: now_s[0])
    lease = await store.grant_lease(10)
    await put(store, "a", lease=lease.id)
    now_s[0] += 9
    await store.close()

    store = await SqliteStore.open(tmp_path / "store", lambda: now_s[0])
    now_s[0] += 9
    await store.keep_lease(lease.id)
    assert await store.get("a")
    now_s[0] += 10
    await store._leases.expire_due()
    assert await store.get("a") is None
    await store.close()


async def test_a_lease_id_is_never_used_again(tmp_path: Path) -> None:
    """Also after the lease is gone and the store was opened anew: an old holder must not keep a stranger's lease."""
    store = await SqliteStore.open(tmp_path / "store")
    first = await store.grant_lease(10)
    await store.revoke_lease(first.id)
    await store.close()
    store = await SqliteStore.open(tmp_path / "store")
    assert (await store.grant_lease(10)).id > first.id
    await store.close()


_WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from alveole.store.base import Put
from alveole.store.sqlite import SqliteStore

async def write(store, writer):
    for number in itertools.count():
        key = f"{sys.argv[2]}/{writer}/{number}"
        await store.txn([], [Put(key=key, value=key.encode() * 20)])
        print(key, flush=True)

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    await asyncio.gather(*(write(store, writer) for writer in range(4)))

asyncio.run(main())
"""


def _written_until_killed(path: Path, run: int, lines: int) -> list[str]:
    """The keys a child said were written; it is killed once it has said that of ``lines``."""
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(run)], stdout=subprocess.PIPE) as child:
        assert child.stdout
        said = [child.stdout.readline() for _ in range(lines)]
        child.send_signal(signal.SIGKILL)
        said += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    return [line.decode().strip() for line in said if line.endswith(b"\n")]


async def test_no_acknowledged_write_is_lost_by_kill(tmp_path: Path) -> None:
    """A child writes in four tasks and says what was acknowledged; killed at three moments, all of that is there."""
    path = tmp_path / "store"
    acknowledged: list[str] = []
    for run, lines in enumerate((1, 60, 400)):
        acknowledged += _written_until_killed(path, run, lines)
        store = await SqliteStore.open(path)
        for key in acknowledged:
            found = await store.get(key)
            assert found is not None
            assert found.value == key.encode() * 20
        await store.close()
    assert len(acknowledged) >= 461


async def test_commits_wait_for_the_disk(tmp_path: Path) -> None:
    """A kill shows nothing of a power failure: that each commit is synced is SQLite's FULL (2), and so asked for."""
    store = await SqliteStore.open(tmp_path / "store")
    assert store._file._rows("PRAGMA synchronous") == [(2,)]
    assert store._file._rows("PRAGMA journal_mode") == [("wal",)]
    await store.close()


async def test_a_creation_killed_half_way_is_begun_anew(tmp_path: Path) -> None:
    """What may be there: an empty file, or one with a journal mode but no tables yet."""
    (tmp_path / "empty").touch()
    half = apsw.Connection(str(tmp_path / "half"))
    half.execute("PRAGMA journal_mode = WAL")
    half.close()
    for name in ("empty", "half"):
        store = await SqliteStore.open(tmp_path / name)
        await put(store, "a")
        await store.close()


async def test_the_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store")
    await put(store, "secret")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    await store.close()


async def test_compaction_leaves_no_row_that_nobody_can_read(tmp_path: Path) -> None:
    """Keys made, changed and deleted for ever must not fill the disk, however compactions cut their lives."""
    store = await SqliteStore.open(tmp_path / "store")
    for step in range(1, 5):
        for number in range(6):
            await put(store, f"short/{step}/{number}")
            await put(store, "long", f"{number}".encode())
            await store.txn([], [Delete(key=f"short/{step}/{number}")])
            if number % 2:
                await store.compact((await store.range("")).revision - step)
    await put(store, "last")
    await store.compact((await store.range("")).revision)
    assert store._file._rows("SELECT key FROM history ORDER BY id") == [("long",), ("last",)]
    await store.close()


# --- ownership ------------------------------------------------------------------------------------------------------


async def test_a_second_opener_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    first = await SqliteStore.open(tmp_path / "store")
    await refused_open(tmp_path / "store", ErrorCode.CONFLICT)
    await put(first, "a")
    await first.close()
    second = await SqliteStore.open(tmp_path / "store")
    assert await second.get("a")
    await second.close()


async def test_another_process_is_refused(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store")
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "store"), "x"]
    child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, errors = await child.communicate()
    assert child.returncode == 1
    assert b"AlveoleError" in errors
    assert b"is in use" in errors
    await store.close()


async def test_other_sqlite_programs_are_kept_out(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store")
    with apsw.Connection(str(tmp_path / "store")) as other, pytest.raises(apsw.BusyError):
        other.execute("SELECT * FROM meta").fetchall()
    other.close()
    await store.close()


async def test_an_interrupted_open_lets_go_of_the_store(tmp_path: Path) -> None:
    opening = asyncio.create_task(SqliteStore.open(tmp_path / "store"))
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait([opening])
    async with asyncio.timeout(5):
        store = await _open_when_free(tmp_path / "store")
    await store.close()


async def _open_when_free(path: Path) -> SqliteStore:
    while True:
        try:
            return await SqliteStore.open(path)
        except AlveoleError as error:
            if error.code is not ErrorCode.CONFLICT:
                raise
            await asyncio.sleep(0.01)


# --- files that cannot be used --------------------------------------------------------------------------------------


async def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    newer = apsw.Connection(str(path))
    newer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    newer.close()
    before = path.read_bytes()
    error = await refused_open(path, ErrorCode.UNSUPPORTED)
    assert f"format {SCHEMA_VERSION + 1}" in error.message
    assert path.read_bytes() == before


async def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    for version in (0, SCHEMA_VERSION):
        other = apsw.Connection(str(path))
        other.execute(f"CREATE TABLE IF NOT EXISTS theirs (x); PRAGMA user_version = {version}")
        other.close()
        await refused_open(path, ErrorCode.INTERNAL)


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.write_bytes(b"not a database " * 1000)
    await refused_open(path, ErrorCode.INTERNAL)
    assert path.read_bytes() == b"not a database " * 1000


async def test_a_damaged_page_is_found_at_open(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = await SqliteStore.open(path)
    await put(store, "large", _LARGE)
    await store.close()
    with path.open("r+b") as file:
        file.seek(_LARGE_PAGE * 4096)
        file.write(b"\xff" * 4096)
    await refused_open(path, ErrorCode.INTERNAL)


async def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    await refused_open(tmp_path / "absent" / "store", ErrorCode.UNAVAILABLE)


# --- disks that fail ------------------------------------------------------------------------------------------------


async def test_a_write_that_does_not_fit_fails_alone(tmp_path: Path) -> None:
    """Of writes committed together only the large one fails when the file may not grow; nothing of it is seen."""
    store = await SqliteStore.open(tmp_path / "store")
    await put(store, "small", b"0")
    watching = store.watch("", 2)
    await anext(watching)
    store._file._db.execute("PRAGMA max_page_count = 60")
    # The first write is under way alone; the two others wait for it, and so are committed together.
    tasks = [asyncio.create_task(put(store, key, value)) for key, value in (("1", b""), ("large", _LARGE), ("2", b""))]
    assert [await code_of(task) for task in tasks] == [None, ErrorCode.EXHAUSTED, None]
    assert [item.key for item in (await store.range("")).items] == ["1", "2", "small"]
    for key, revision in (("1", 3), ("2", 4)):
        assert [(change.key, change.revision) for change in await anext(watching)] == [(key, revision)]
    store._file._db.execute("PRAGMA max_page_count = 100000")
    await put(store, "large", _LARGE)
    assert [(change.key, change.revision) for change in await anext(watching)] == [("large", 5)]
    await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


@pytest.mark.root
async def test_a_full_disk_is_told_and_the_store_stays_usable(small_disk: Path) -> None:
    """Filled until a write fails, it still reads all that was acknowledged; with space again, it writes again."""
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (2 << 20))
    store = await SqliteStore.open(small_disk / "store")
    written = 0
    while (code := await code_of(asyncio.ensure_future(put(store, f"k/{written}", _LARGE)))) is None:
        written += 1
    assert code is ErrorCode.EXHAUSTED
    assert await code_of(asyncio.ensure_future(put(store, "more", _LARGE))) is ErrorCode.EXHAUSTED
    assert [item.key for item in (await store.range("")).items] == [f"k/{number}" for number in range(written)]
    filler.unlink()
    await put(store, "after")
    await store.close()
    store = await SqliteStore.open(small_disk / "store")
    assert len((await store.range("")).items) == written + 1
    await store.close()


@pytest.mark.root
async def test_a_lease_that_cannot_be_deleted_on_a_full_disk_is_deleted_later(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = [0.0]
    store = await SqliteStore.open(small_disk / "store", lambda: now_s[0])
    lease = await store.grant_lease(1)
    for number in range(40):
        await store.txn([], [Put(key=f"k/{number}/{key}", value=b"v", lease=lease.id) for key in range(100)])
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        _fill(filler)
    now_s[0] += 1
    await store._leases.expire_due()
    assert "cannot be deleted yet" in caplog.text
    assert await store.get("k/0/0")
    filler.unlink()
    await store._leases.expire_due()
    assert (await store.range("")).items == ()
    await store.close()


async def test_an_input_output_error_is_told_and_the_store_stays_usable(tmp_path: Path) -> None:
    """The kernel refuses to let any file of this process grow further (EFBIG): not a full disk, no answer."""
    store = await SqliteStore.open(tmp_path / "store")
    await put(store, "a", b"1")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log_bytes = (tmp_path / "store-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (log_bytes + 8192, hard))
    try:
        code = await code_of(asyncio.ensure_future(put(store, "large", _LARGE)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code is ErrorCode.UNAVAILABLE
    assert [item.key for item in (await store.range("")).items] == ["a"]
    await put(store, "b")
    await store.close()
    store = await SqliteStore.open(tmp_path / "store")
    assert [item.key for item in (await store.range("")).items] == ["a", "b"]
    await store.close()


async def test_a_fault_in_one_write_is_told_to_its_caller_only(tmp_path: Path) -> None:
    """A value of a wrong type, which a typed caller cannot send, does not fail those committed with it."""
    store = await SqliteStore.open(tmp_path / "store")
    first = asyncio.create_task(put(store, "a"))
    wrong = asyncio.create_task(store.compact("x"))  # type: ignore[arg-type]
    right = asyncio.create_task(put(store, "b"))
    with pytest.raises(TypeError):
        await wrong
    await asyncio.gather(first, right)
    assert await store.get("b")
    await store.close()
