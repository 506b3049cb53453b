"""The Store of one machine: a SQLite file, worked on by one thread of its own so that the event loop never waits.

Transactions that wait together are committed together: one fsync acknowledges them all.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from alveole.store.base import Compare, KeyValue, Lease, Page, TxnResult, Write
from alveole.store.local import LocalStore
from alveole.store.sqlite_file import Commit, SqliteFile
from alveole.store.watch import History

MAX_GROUP = 256  # writes in one commit; bounds how long the thread is away from reads

_T = TypeVar("_T")
_Waiting = tuple[Callable[[], Any], asyncio.Future[Any]]


class SqliteStore(LocalStore):
    """Open it with :meth:`open`. The file belongs to one store object at a time."""

    def __init__(self, file: SqliteFile, thread: ThreadPoolExecutor, clock: Callable[[], float]) -> None:
        super().__init__(file.store_id, clock, held=file.leases, last_lease_id=file.last_lease_id)
        self._file = file
        self._thread = thread
        self._waiting: list[_Waiting] = []
        self._committing: asyncio.Future[Commit] | None = None

    @classmethod
    async def open(
        cls, path: Path, clock: Callable[[], float] = time.monotonic, give_way: Callable[[], bool] = lambda: False
    ) -> Self:
        """Make or open the store at ``path``; its directory must exist.

        ``give_way`` is called, in a thread, when the disk is full: True if it freed some.

        Raises CONFLICT if it is open elsewhere, UNSUPPORTED if a newer Alveole made it, INTERNAL if it is damaged,
        UNAVAILABLE or EXHAUSTED if it cannot be read or written.
        """
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        opening = thread.submit(SqliteFile, path, give_way)
        try:
            file = await asyncio.wrap_future(opening)
        except BaseException:
            opening.add_done_callback(_close_opened)
            thread.shutdown(wait=False)
            raise
        return cls(file, thread, clock)

    async def _get(self, key: str) -> KeyValue | None:
        return await self._read(partial(self._file.get, key))

    async def _range(self, prefix: str, start: str, size: int, revision: int | None) -> Page:
        return await self._read(partial(self._file.range, prefix, start, size, revision))

    async def _history(self, prefix: str, first_revision: int) -> History:
        return await self._read(partial(self._file.history, prefix, first_revision))

    async def _txn(self, compare: Sequence[Compare], then: Sequence[Write], otherwise: Sequence[Write]) -> TxnResult:
        return await self._write(partial(self._file.txn, compare, then, otherwise))

    async def _grant(self, lease: Lease) -> None:
        await self._write(partial(self._file.grant, lease))

    async def _revoke(self, lease_id: int) -> None:
        await self._write(partial(self._file.revoke, lease_id))

    async def _compact(self, revision: int) -> None:
        await self._write(partial(self._file.compact, revision))

    async def _shut(self) -> None:
        while self._committing is not None:
            await asyncio.wait({self._committing})
        await self._on_thread(self._file.close)
        self._thread.shutdown()

    async def _read(self, read: Callable[[], _T]) -> _T:
        return await self._on_thread(partial(self._file.reading, read))

    async def _write(self, write: Callable[[], _T]) -> _T:
        done: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._waiting.append((write, done))
        if self._committing is None:
            self._commit_waiting()
        return await done

    def _commit_waiting(self) -> None:
        group, self._waiting = self._waiting[:MAX_GROUP], self._waiting[MAX_GROUP:]
        self._committing = self._on_thread(partial(self._file.commit, [write for write, _ in group]))
        self._committing.add_done_callback(partial(self._committed, [done for _, done in group]))

    def _committed(self, waiters: Sequence[asyncio.Future[Any]], committing: asyncio.Future[Commit]) -> None:
        self._committing = None
        if self._waiting:
            self._commit_waiting()
        commit = committing.result()
        self._watchers.publish(commit.revisions)
        for done, outcome in zip(waiters, commit.outcomes, strict=True):
            if done.done():  # its caller was cancelled
                continue
            if isinstance(outcome, Exception):
                done.set_exception(outcome)
            else:
                done.set_result(outcome)

    def _on_thread(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work)


def _close_opened(opening: Future[SqliteFile]) -> None:
    """The opener was cancelled or failed: release what the thread may still have opened."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
