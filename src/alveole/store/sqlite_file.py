"""The SQLite file of a store: every statement, run by one thread. What is written, and what it means, in SQL."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import apsw

from alveole.model.error import AlveoleError, not_found
from alveole.store.base import Change, Compare, Delete, KeyValue, Lease, Page, Put, TxnResult, Write
from alveole.store.revision import check_kept, check_made, compaction_due, holds, prefix_end, written
from alveole.store.sqlite_open import connect, lock, told, transaction
from alveole.store.watch import Changes, History

REPLAY_REVISIONS = 256  # read at a time for a watcher, so that a long replay does not hold up writes

_T = TypeVar("_T")
_Row = tuple[Any, ...]
_Value = str | bytes | int

_FIELDS = "h.key, h.value, h.create_revision, h.revision, h.version, h.lease"
_CURRENT = f"SELECT {_FIELDS} FROM current AS c JOIN history AS h ON h.id = c.history_id"  # noqa: S608
_NOW = f"{_CURRENT} WHERE c.key >= ? AND c.key < ? ORDER BY c.key LIMIT ?"
_THEN = f"""
SELECT {_FIELDS} FROM history AS h WHERE h.key >= ? AND h.key < ? AND h.value IS NOT NULL
  AND h.revision = (SELECT max(revision) FROM history WHERE key = h.key AND revision <= ?)
ORDER BY h.key LIMIT ?"""  # noqa: S608
_REPLAY = f"""
SELECT {_FIELDS} FROM history AS h INDEXED BY history_by_revision
WHERE h.revision BETWEEN ? AND ? AND h.key >= ? AND h.key < ? ORDER BY h.revision, h.id"""  # noqa: S608
_FORGET_SUPERSEDED = """
DELETE FROM history WHERE id IN (
  SELECT (SELECT old.id FROM history AS old WHERE old.key = new.key AND old.revision < new.revision
          ORDER BY old.revision DESC LIMIT 1)
  FROM history AS new WHERE new.revision > ? AND new.revision <= ?)"""
_FORGET_DELETED = "DELETE FROM history WHERE revision >= ? AND revision < ? AND value IS NULL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a group of writes came to: an answer or error for each, and the revisions made, for the watchers."""

    outcomes: tuple[Any, ...]
    revisions: tuple[Changes, ...]


class SqliteFile:
    """Not thread-safe, and blocking. Nothing of the contents is held in memory, so a rollback leaves no trace there."""

    def __init__(self, path: Path, give_way: Callable[[], bool] = lambda: False) -> None:
        """``give_way`` is called when the disk is full: True if it freed some, and a commit is worth another try."""
        self._path = path
        self._give_way = give_way
        with ExitStack() as undo:
            self._lock = lock(path)
            undo.callback(os.close, self._lock)
            self._db = connect(path)
            undo.callback(self._db.close)
            self.store_id: str = self.reading(lambda: self._one("SELECT store_id FROM meta"))[0]
            leases = self.reading(lambda: self._rows("SELECT id, ttl_s FROM lease ORDER BY id"))
            self.leases = tuple(Lease(id=lease_id, ttl_s=ttl_s) for lease_id, ttl_s in leases)
            last = self.reading(lambda: self._one("SELECT coalesce(max(seq), 0) FROM sqlite_sequence"))
            self.last_lease_id: int = last[0]
            undo.pop_all()

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    def commit(self, writes: Sequence[Callable[[], Any]]) -> Commit:
        """Do all in one durable transaction; if that fails, each in its own, so that one cannot fail another."""
        try:
            with transaction(self._db):
                before = self._revision()
                outcomes = tuple([self._attempt(write) for write in writes])
                revisions = tuple(self._revisions("", before + 1, self._revision()))
                self._compact_if_due()
        except Exception as error:  # also a fault in one write: its caller hears of it, the others go on
            if isinstance(error, apsw.FullError) and self._give_way():
                return self.commit(writes)
            if len(writes) > 1:
                return _joined([self.commit([write]) for write in writes])
            reason = told(error, self._path) if isinstance(error, apsw.Error) else error
            return Commit(outcomes=(reason,), revisions=())
        return Commit(outcomes=outcomes, revisions=revisions)

    def reading(self, read: Callable[[], _T]) -> _T:
        try:
            return read()
        except apsw.Error as error:
            raise told(error, self._path) from error

    def get(self, key: str) -> KeyValue | None:
        rows = self._rows(f"{_CURRENT} WHERE c.key = ?", key)
        return _key_value(rows[0]) if rows else None

    def range(self, prefix: str, start: str, size: int, revision: int | None) -> Page:
        current, compacted = self._one("SELECT revision, compacted FROM meta")
        at = current if revision is None else revision
        check_kept(at, compacted)
        check_made(at, current)
        if at == current:
            rows = self._rows(_NOW, start, _end(prefix), size + 1)
        else:
            rows = self._rows(_THEN, start, _end(prefix), at, size + 1)
        next_key = rows[size][0] if len(rows) > size else None
        return Page(items=tuple(_key_value(row) for row in rows[:size]), revision=at, next_key=next_key)

    def history(self, prefix: str, first_revision: int) -> History:
        current, compacted = self._one("SELECT revision, compacted FROM meta")
        check_kept(first_revision, compacted)
        last = min(first_revision + REPLAY_REVISIONS - 1, current)
        return History(
            revisions=tuple(self._revisions(prefix, first_revision, last)) if first_revision <= last else (),
            next_revision=max(first_revision, last + 1),
            complete=last >= current or first_revision > current,
        )

    def txn(self, compare: Sequence[Compare], then: Sequence[Write], otherwise: Sequence[Write]) -> TxnResult:
        succeeded = all(holds(comparison, self.get(comparison.key)) for comparison in compare)
        return TxnResult(succeeded=succeeded, revision=self._apply(then if succeeded else otherwise))

    def grant(self, lease: Lease) -> None:
        self._db.execute("INSERT INTO lease (id, ttl_s) VALUES (?, ?)", (lease.id, lease.ttl_s))

    def revoke(self, lease_id: int) -> None:
        keys = self._rows("SELECT key FROM current WHERE lease = ? ORDER BY key", lease_id)
        self._apply([Delete(key=key) for (key,) in keys])
        self._db.execute("DELETE FROM lease WHERE id = ?", (lease_id,))

    def compact(self, revision: int) -> None:
        current, compacted = self._one("SELECT revision, compacted FROM meta")
        check_made(revision, current)
        if revision > compacted:
            self._db.execute(_FORGET_SUPERSEDED, (compacted, revision))
            self._db.execute(_FORGET_DELETED, (compacted, revision))
            self._db.execute("UPDATE meta SET compacted = ?", (revision,))

    def _one(self, statement: str) -> _Row:
        (row,) = self._rows(statement)
        return row

    def _rows(self, statement: str, *bindings: _Value) -> list[_Row]:
        return self._db.execute(statement, bindings).fetchall()

    def _revision(self) -> int:
        revision: int = self._one("SELECT revision FROM meta")[0]
        return revision

    def _attempt(self, write: Callable[[], Any]) -> Any:
        self._db.execute("SAVEPOINT attempt")
        try:
            outcome = write()
        except AlveoleError as refused:
            self._db.execute("ROLLBACK TO attempt")
            outcome = refused
        self._db.execute("RELEASE attempt")
        return outcome

    def _compact_if_due(self) -> None:
        if (due := compaction_due(*self._one("SELECT revision, compacted FROM meta"))) is not None:
            self.compact(due)

    def _apply(self, writes: Sequence[Write]) -> int:
        """Do the writes as the next revision; nothing really written makes none. Returns the store's revision."""
        before = self._revision()
        revision = before + 1
        if not sum([self._apply_one(write, revision) for write in writes]):
            return before
        self._db.execute("UPDATE meta SET revision = ?", (revision,))
        return revision

    def _apply_one(self, write: Write, revision: int) -> int:
        """Returns how many keys it changed."""
        if isinstance(write, Put):
            self._put(write, revision)
            return 1
        bounds = (write.key, _end(write.key)) if write.prefix else (write.key, write.key + "\0")
        deleted = self._rows("DELETE FROM current WHERE key >= ? AND key < ? RETURNING key", *bounds)
        rows = [(key, revision) for (key,) in sorted(deleted)]
        self._db.executemany("INSERT INTO history (key, revision) VALUES (?, ?)", rows)
        return len(rows)

    def _put(self, put: Put, revision: int) -> None:
        if put.lease and not self._rows("SELECT 1 FROM lease WHERE id = ?", put.lease):
            raise not_found(f"lease {put.lease} of key {put.key!r} does not exist")
        new = written(put, self.get(put.key), revision)
        self._db.execute(
            "INSERT INTO history (key, revision, value, create_revision, version, lease) VALUES (?, ?, ?, ?, ?, ?)",
            (new.key, revision, new.value, new.create_revision, new.version, new.lease),
        )
        self._db.execute(
            "INSERT OR REPLACE INTO current (key, history_id, lease) VALUES (?, ?, ?)",
            (new.key, self._db.last_insert_rowid(), new.lease),
        )

    def _revisions(self, prefix: str, first: int, last: int) -> Iterator[Changes]:
        rows = self._db.execute(_REPLAY, (first, last, prefix, _end(prefix)))
        for _, group in groupby(map(_change, rows), key=lambda change: change.revision):
            yield tuple(group)


def _joined(commits: Iterable[Commit]) -> Commit:
    commits = tuple(commits)
    return Commit(
        outcomes=tuple(outcome for commit in commits for outcome in commit.outcomes),
        revisions=tuple(revision for commit in commits for revision in commit.revisions),
    )


def _end(prefix: str) -> str | bytes:
    """Upper bound for keys with ``prefix``. SQLite orders every blob above every text: so b"" stands for no bound."""
    end = prefix_end(prefix)
    return b"" if end is None else end


def _key_value(row: _Row) -> KeyValue:
    key, value, create_revision, revision, version, lease = row
    return KeyValue(
        key=key, value=value, create_revision=create_revision, mod_revision=revision, version=version, lease=lease
    )


def _change(row: _Row) -> Change:
    return Change(key=row[0], value=None if row[1] is None else _key_value(row), revision=row[3])
