"""A consistent in-memory picture of the store, kept current by one watch.

Reads are answered from it. Whoever wrote at a revision waits for ``reached(revision)`` to read its own write.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from alveole.control import keys
from alveole.model.base import Record
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.image import Image
from alveole.model.instance import Instance
from alveole.model.network import Network
from alveole.model.node import Node
from alveole.model.operation import Operation
from alveole.model.snapshot import Snapshot
from alveole.model.volume import Volume
from alveole.store.base import Change, KeyValue, Store

log = logging.getLogger(__name__)

_MODELS: dict[str, type[Record]] = {
    "instances": Instance,
    "images": Image,
    "networks": Network,
    "volumes": Volume,
    "snapshots": Snapshot,
    "operations": Operation,
    "nodes": Node,
}
SUBSCRIBER_QUEUE = 10_000


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored record and the revision it was last written at."""

    key: str
    record: Any  # one of _MODELS; raw bytes for addresses, subnets and idempotency keys
    revision: int


@dataclass(frozen=True, slots=True)
class Update:
    """One change: ``old`` is None when created, ``new`` is None when removed."""

    key: str
    old: Entry | None
    new: Entry | None
    revision: int


@dataclass(eq=False)
class Subscription:
    """The updates of collections whose name begins with ``prefix``. Overflow ends it: list again."""

    prefix: str
    queue: asyncio.Queue[Update | None] = field(default_factory=lambda: asyncio.Queue(SUBSCRIBER_QUEUE))

    def push(self, update: Update) -> None:
        if self.queue.full():
            while not self.queue.empty():
                self.queue.get_nowait()
            self.queue.put_nowait(None)
            return
        self.queue.put_nowait(update)

    async def updates(self) -> AsyncIterator[Update]:
        while (update := await self.queue.get()) is not None:
            yield update
        raise AlveoleError(ErrorCode.GONE, "this reader fell too far behind the changes", hint="list again")


class Cache:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._tables: dict[str, dict[str, Entry]] = {}
        self._revision = 0
        self._advanced = asyncio.Condition()
        self._subscriptions: set[Subscription] = set()
        self.unreadable: set[str] = set()  # keys of records that a newer version wrote

    @property
    def revision(self) -> int:
        return self._revision

    def get(self, key: str) -> Entry | None:
        return self._tables.get(keys.table_of(key), {}).get(key)

    def table(self, name: str) -> list[Entry]:
        """All entries of a collection, by key."""
        table = self._tables.get(name, {})
        return [table[key] for key in sorted(table)]

    def names(self, name: str) -> set[str]:
        """The last part of every key of a collection."""
        return {key[len(name) :] for key in self._tables.get(name, {})}

    def everywhere(self, plural: str) -> Iterator[Entry]:
        """Entries of this kind in all projects."""
        for name, table in self._tables.items():
            if name.startswith("projects/") and name.endswith(f"/{plural}/"):
                yield from table.values()

    async def reached(self, revision: int) -> None:
        async with self._advanced:
            await self._advanced.wait_for(lambda: self._revision >= revision)

    @contextmanager
    def subscribe(self, prefix: str = "") -> Iterator[Subscription]:
        """Updates from now on. List after subscribing: nothing is missed, some may be seen twice."""
        subscription = Subscription(prefix)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    async def run(self, ready: asyncio.Event) -> None:
        """Follow the store until cancelled; ``ready`` is set when the first listing is in."""
        while True:
            await self._relist()
            ready.set()
            try:
                async for changes in self._store.watch("", self._revision + 1):
                    await self._apply(changes)
            except AlveoleError as error:
                if error.code is not ErrorCode.GONE:
                    raise
                log.warning("the store's history was lost; listing again")

    async def _relist(self) -> None:
        found: dict[str, KeyValue] = {}
        page = await self._store.range("")
        while True:
            found.update((item.key, item) for item in page.items)
            if page.next_key is None:
                break
            page = await self._store.range("", from_key=page.next_key, revision=page.revision)
        known = [key for table in self._tables.values() for key in table]
        gone = [Change(key=key, value=None, revision=page.revision) for key in known if key not in found]
        news = [
            Change(key=key, value=item, revision=item.mod_revision)
            for key, item in found.items()
            if (entry := self.get(key)) is None or entry.revision != item.mod_revision
        ]
        await self._apply((*gone, *news), reached=page.revision)

    async def _apply(self, changes: tuple[Change, ...], reached: int = 0) -> None:
        for change in changes:
            self._apply_one(change)
        async with self._advanced:
            self._revision = max(self._revision, reached, *(change.revision for change in changes), 0)
            self._advanced.notify_all()

    def _apply_one(self, change: Change) -> None:
        table_name = keys.table_of(change.key)
        table = self._tables.setdefault(table_name, {})
        old = table.get(change.key)
        new = None
        if change.value is not None:
            new = _read(change.value, table_name)
        self.unreadable.discard(change.key)
        if change.value is not None and new is None:
            self.unreadable.add(change.key)
        if new is None:
            table.pop(change.key, None)
        else:
            table[change.key] = new
        if old is None and new is None:
            return
        for subscription in self._subscriptions:
            if table_name.startswith(subscription.prefix):
                subscription.push(Update(change.key, old, new, change.revision))


def _read(item: KeyValue, table: str) -> Entry | None:
    """The record, or None (and a warning) if a newer version wrote what this one cannot read: it is left untouched."""
    model = _MODELS.get(table.rstrip("/").rsplit("/", 1)[-1])
    if model is None:
        return Entry(item.key, item.value, item.mod_revision)
    try:
        return Entry(item.key, model.from_json(item.value), item.mod_revision)
    except ValidationError as error:
        log.warning("record %s is not readable by this version and is left alone: %s", item.key, error)
        return None
