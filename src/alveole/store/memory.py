"""The reference model of the Store contract, in plain Python structures. Nothing outlives the process."""

import bisect
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence

from alveole.model.error import not_found
from alveole.store.base import Change, Compare, Delete, KeyValue, Lease, Page, Put, TxnResult, Write
from alveole.store.local import LocalStore
from alveole.store.revision import FIRST_REVISION, check_kept, check_made, compaction_due, holds, written
from alveole.store.watch import Changes, History


class MemoryStore(LocalStore):
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(secrets.token_hex(4), clock)
        self._revision = FIRST_REVISION
        self._compacted = 0
        self._log: dict[int, Changes] = {}
        self._keys: list[str] = []  # sorted; code point order is UTF-8 byte order
        self._versions: dict[str, list[Change]] = {}  # of each key, oldest first

    async def _get(self, key: str) -> KeyValue | None:
        return self._at(key, self._revision)

    async def _range(self, prefix: str, start: str, size: int, revision: int | None) -> Page:
        at = self._revision if revision is None else revision
        check_kept(at, self._compacted)
        check_made(at, self._revision)
        found = (self._at(key, at) for key in self._keys_from(start, prefix))
        items = list(itertools.islice((item for item in found if item), size + 1))
        return Page(items=tuple(items[:size]), revision=at, next_key=items[size].key if len(items) > size else None)

    async def _txn(self, compare: Sequence[Compare], then: Sequence[Write], otherwise: Sequence[Write]) -> TxnResult:
        succeeded = all(holds(comparison, self._at(comparison.key, self._revision)) for comparison in compare)
        branch = then if succeeded else otherwise
        for write in branch:
            if isinstance(write, Put) and write.lease and write.lease not in self._leases:
                raise not_found(f"lease {write.lease} of key {write.key!r} does not exist")
        self._apply(branch)
        return TxnResult(succeeded=succeeded, revision=self._revision)

    async def _history(self, prefix: str, first_revision: int) -> History:
        check_kept(first_revision, self._compacted)
        logged = (changes for revision, changes in self._log.items() if revision >= first_revision)
        wanted = (tuple(change for change in changes if change.key.startswith(prefix)) for changes in logged)
        return History(
            revisions=tuple(changes for changes in wanted if changes),
            next_revision=max(first_revision, self._revision + 1),
            complete=True,
        )

    async def _grant(self, lease: Lease) -> None:
        """Nothing to store: the deadline is all there is."""

    async def _revoke(self, lease_id: int) -> None:
        current = (self._at(key, self._revision) for key in self._keys)
        self._apply([Delete(key=item.key) for item in current if item and item.lease == lease_id])

    async def _compact(self, revision: int) -> None:
        check_made(revision, self._revision)
        self._forget_before(revision)

    async def _shut(self) -> None:
        """Nothing to release."""

    def _at(self, key: str, revision: int) -> KeyValue | None:
        versions = self._versions.get(key, [])
        count = bisect.bisect_right(versions, revision, key=lambda change: change.revision)
        return versions[count - 1].value if count else None

    def _keys_from(self, start: str, prefix: str) -> Iterator[str]:
        from_start = itertools.islice(self._keys, bisect.bisect_left(self._keys, start), None)
        return itertools.takewhile(lambda key: key.startswith(prefix), from_start)

    def _apply(self, writes: Sequence[Write]) -> None:
        revision = self._revision + 1
        changes = tuple(change for write in writes for change in self._changes(write, revision))
        if not changes:
            return
        self._revision = revision
        self._log[revision] = changes
        for change in changes:
            if change.key not in self._versions:
                bisect.insort(self._keys, change.key)
            self._versions.setdefault(change.key, []).append(change)
        self._watchers.publish([changes])
        if (due := compaction_due(revision, self._compacted)) is not None:
            self._forget_before(due)

    def _changes(self, write: Write, revision: int) -> Iterator[Change]:
        if isinstance(write, Put):
            value = written(write, self._at(write.key, self._revision), revision)
            yield Change(key=write.key, value=value, revision=revision)
            return
        for key in self._keys_from(write.key, write.key) if write.prefix else [write.key]:
            if self._at(key, self._revision):
                yield Change(key=key, value=None, revision=revision)

    def _forget_before(self, revision: int) -> None:
        if revision <= self._compacted:
            return
        self._compacted = revision
        self._log = {number: changes for number, changes in self._log.items() if number >= revision}
        kept = {key: _kept_versions(versions, revision) for key, versions in self._versions.items()}
        self._versions = {key: versions for key, versions in kept.items() if versions}
        self._keys = sorted(self._versions)


def _kept_versions(versions: Sequence[Change], revision: int) -> list[Change]:
    """What is needed to read the key at ``revision`` and later, and to watch it from there."""
    count = bisect.bisect_right(versions, revision, key=lambda change: change.revision)
    kept = list(versions[max(count - 1, 0) :])
    return kept[1:] if kept[0].value is None and kept[0].revision < revision else kept
