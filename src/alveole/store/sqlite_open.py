"""Opening the SQLite file of a store: whose it is, what is in it, and what its errors mean."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from alveole.model.error import AlveoleError, conflict, exhausted, internal, unavailable, unsupported
from alveole.store.revision import FIRST_REVISION

SCHEMA_VERSION = 1
BUSY_TIMEOUT_MS = 5000  # for another program that looks into the file; Alveole itself never shares it

# history: every version of every key, value NULL where it was deleted. current: the newest version of each live key.
_SCHEMA = """
CREATE TABLE meta (
  only INTEGER PRIMARY KEY CHECK (only = 1),
  store_id TEXT NOT NULL, revision INTEGER NOT NULL, compacted INTEGER NOT NULL
) STRICT;
CREATE TABLE history (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL, revision INTEGER NOT NULL,
  value BLOB, create_revision INTEGER, version INTEGER, lease INTEGER
) STRICT;
CREATE UNIQUE INDEX history_by_key ON history (key, revision);
CREATE INDEX history_by_revision ON history (revision);
CREATE TABLE current (
  key TEXT PRIMARY KEY, history_id INTEGER NOT NULL, lease INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX current_by_lease ON current (lease) WHERE lease != 0;
CREATE TABLE lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s INTEGER NOT NULL) STRICT;
"""


def lock(path: Path) -> int:
    """Take the store at ``path`` for this process. Closing the descriptor, or the end of the process, gives it back.

    Raises CONFLICT if another store object has it. The lock file is never removed: removing it would let two in.
    """
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _told_by_system(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno != errno.EWOULDBLOCK:
            raise _told_by_system(error, path) from error
        raise conflict(f"store {path} is in use", hint="stop the other daemon that uses this state directory") from None
    return descriptor


def connect(path: Path) -> apsw.Connection:
    """Open the file, made durably if it is new. The caller holds its lock."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    except OSError as error:
        raise _told_by_system(error, path) from error
    except apsw.Error as error:
        raise told(error, path) from error
    try:
        _prepare(db, path)
        _sync_directory(path.parent)
    except apsw.Error as error:
        db.close()
        raise told(error, path) from error
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def transaction(db: apsw.Connection) -> Iterator[None]:
    """Durable when it ends; an error inside it or in the commit leaves nothing of it, and comes through as it is."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # after a full disk or a failed write SQLite may have rolled back already
            db.execute("ROLLBACK")
        raise


def told(error: apsw.Error, path: Path) -> AlveoleError:
    """What a SQLite error means to the user of the store."""
    match error:
        case apsw.FullError():
            return exhausted(f"the disk of store {path} is full", hint="free space there and try again")
        case apsw.CorruptError() | apsw.NotADBError() | apsw.SQLError():  # the last: tables or columns are missing
            return _damaged(path, str(error))
        case _:
            return unavailable(f"store {path} could not be read or written: {error}", hint="check its disk and rights")


def _damaged(path: Path, finding: str) -> AlveoleError:
    message = f"store {path} is damaged or no store of Alveole: {finding}"
    return internal(message, hint="put back a backup of it, or begin with an empty state directory")


def _told_by_system(error: OSError, path: Path) -> AlveoleError:
    message = f"store {path} could not be opened: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return exhausted(message, hint="free space there and try again")
    return unavailable(message, hint="check that its directory exists and can be written")


def _prepare(db: apsw.Connection, path: Path) -> None:
    db.set_busy_timeout(BUSY_TIMEOUT_MS)
    # Other programs are kept out while it is open: an old SQLite (Debian's 3.40) could damage the log of a shared file.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    is_new = _check_contents(db, path)  # before the first write: a file that is not ours stays as it is
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")  # NORMAL could lose acknowledged commits when the power fails
    db.execute("PRAGMA trusted_schema = OFF")
    if is_new:
        _create(db)


def _check_contents(db: apsw.Connection, path: Path) -> bool:
    """True if the file is empty. Raises unless it is that or a whole store of a version we know."""
    version = _pragma(db, "user_version")
    if version > SCHEMA_VERSION:
        message = f"store {path} has format {version}, this Alveole knows up to {SCHEMA_VERSION}"
        raise unsupported(message, hint="install the newer Alveole that wrote it")
    if version == 0:
        if db.execute("SELECT 1 FROM sqlite_schema").fetchone():
            raise _damaged(path, "it has tables of another program")
        return True
    finding = _pragma(db, "quick_check(1)")
    if finding != "ok":
        raise _damaged(path, finding)
    return False


def _pragma(db: apsw.Connection, name: str) -> Any:
    ((value,),) = db.execute(f"PRAGMA {name}").fetchall()
    return value


def _create(db: apsw.Connection) -> None:
    with transaction(db):  # one transaction: a killed creation leaves an empty file, which is made anew
        db.execute(_SCHEMA)
        db.execute("INSERT INTO meta VALUES (1, ?, ?, 0)", (secrets.token_hex(4), FIRST_REVISION))
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _sync_directory(directory: Path) -> None:
    """SQLite syncs the file, not its name: without this a new store could vanish when the power fails."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
