"""Fan-out: every watcher gets the history it asked for, then what is committed from then on, without gap or double."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass

from alveole.model.error import AlveoleError, ErrorCode
from alveole.store.base import Change

MAX_WAITING_REVISIONS = 1000  # of one watcher, before it is dropped

Changes = tuple[Change, ...]
"""The changes of one whole revision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A part of the past: all changes from the revision asked for up to, not including, ``next_revision``."""

    revisions: tuple[Changes, ...]
    next_revision: int
    complete: bool  # reaches the newest revision


ReadHistory = Callable[[str, int], Awaitable[History]]


class _Watcher:
    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._waiting: asyncio.Queue[Changes | AlveoleError] = asyncio.Queue()

    def offer(self, changes: Changes) -> bool:
        """False if the watcher is too far behind and was told so."""
        wanted = tuple(change for change in changes if change.key.startswith(self._prefix))
        if not wanted:
            return True
        if self._waiting.qsize() < MAX_WAITING_REVISIONS:
            self._waiting.put_nowait(wanted)
            return True
        message = f"the watcher of {self._prefix!r} fell {MAX_WAITING_REVISIONS} revisions behind and was dropped"
        self.end(AlveoleError(ErrorCode.GONE, message, hint="list again and watch from the revision of that list"))
        return False

    def end(self, reason: AlveoleError) -> None:
        self._waiting = asyncio.Queue() if self._waiting.qsize() >= MAX_WAITING_REVISIONS else self._waiting
        self._waiting.put_nowait(reason)

    async def next(self) -> Changes:
        changes = await self._waiting.get()
        if isinstance(changes, AlveoleError):
            raise changes
        return changes


class Watchers:
    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()

    def __len__(self) -> int:
        return len(self._watchers)

    def publish(self, revisions: Iterable[Changes]) -> None:
        """Called once for every committed revision, in order."""
        for changes in revisions:
            self._watchers = {watcher for watcher in self._watchers if watcher.offer(changes)}

    def close(self, reason: AlveoleError) -> None:
        for watcher in self._watchers:
            watcher.end(reason)
        self._watchers.clear()

    async def follow(self, prefix: str, from_revision: int, read: ReadHistory) -> AsyncGenerator[Changes, None]:
        watcher = _Watcher(prefix)
        # Listening before reading leaves no gap; skipping live what history covered leaves no double.
        self._watchers.add(watcher)
        try:
            history = await read(prefix, from_revision)
            while True:
                for changes in history.revisions:
                    yield changes
                if history.complete:
                    break
                history = await read(prefix, history.next_revision)
            while True:
                changes = await watcher.next()
                if changes[0].revision >= history.next_revision:
                    yield changes
        finally:
            self._watchers.discard(watcher)
