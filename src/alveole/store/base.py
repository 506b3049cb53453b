"""The Store contract: etcd's semantics, so that moving from one machine to several changes nothing above it.

Keys are UTF-8 strings, values bytes. Every transaction that writes makes a new *revision* of the whole store.
All drivers enforce etcd's default limits (:data:`MAX_OPERATIONS`, :data:`MAX_REQUEST_BYTES`, whole-second leases).

"No" and "no answer" differ: a transaction whose comparison failed returns ``succeeded=False``; a store that could not
be reached or written raises ``AlveoleError(UNAVAILABLE)`` (or EXHAUSTED when its disk is full), and the write may or
may not have happened.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

MAX_OPERATIONS = 128  # comparisons, and operations of each branch, in one transaction (etcd --max-txn-ops)
MAX_REQUEST_BYTES = 1 << 20  # all keys and values of one transaction
MAX_PAGE = 1000  # keys in one range answer
KEPT_REVISIONS = 10_000  # history a driver that compacts by itself keeps at least


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int  # writes since it was created, 1 at first
    lease: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A part of a range, read at one ``revision``; ``next_key`` is where to go on, None at the end."""

    items: tuple[KeyValue, ...]
    revision: int
    next_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """True if the key's ``target`` equals ``value``. A key that does not exist has 0 for all three."""

    key: str
    target: Literal["create_revision", "mod_revision", "version"]
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Delete one key, or with ``prefix`` all keys that begin with it."""

    key: str
    prefix: bool = False


Write = Put | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class TxnResult:
    succeeded: bool  # which branch ran
    revision: int  # of the store after it


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One key's change at one revision; ``value`` is None when it was deleted."""

    key: str
    value: KeyValue | None
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    id: int
    ttl_s: int


class Store(Protocol):
    """Where state is kept. All methods may be called concurrently from one event loop."""

    @property
    def id(self) -> str:
        """8 hex digits made when the store was; event tokens are ``id:revision``."""
        ...

    async def get(self, key: str) -> KeyValue | None: ...

    async def range(
        self, prefix: str, *, limit: int = MAX_PAGE, from_key: str | None = None, revision: int | None = None
    ) -> Page:
        """Keys that begin with ``prefix``, in byte order, at most ``min(limit, MAX_PAGE)`` of them.

        ``from_key`` and ``revision`` go on a former page at its revision.
        Raises AlveoleError(GONE) if that revision was compacted.
        """
        ...

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], otherwise: Sequence[Write] = ()
    ) -> TxnResult:
        """Atomically: if all comparisons hold, do ``then``, else ``otherwise``. Durable when it returns.

        A branch may not write a key twice. Raises INVALID over the limits, NOT_FOUND for an unknown lease.
        """
        ...

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[tuple[Change, ...]]:
        """Every change of keys under ``prefix`` with revision >= ``from_revision``, in order, none left out, for ever.

        A tuple holds whole revisions. Raises AlveoleError(GONE) if ``from_revision`` was compacted, or if
        the watcher fell so far behind that the store had to drop it: list again.
        """
        ...

    async def grant_lease(self, ttl_s: int) -> Lease:
        """A lease; keys put under it are deleted when it is not kept alive for ``ttl_s`` whole seconds."""
        ...

    async def keep_lease(self, lease_id: int) -> None:
        """Renew. Raises NOT_FOUND if it has expired."""
        ...

    async def revoke_lease(self, lease_id: int) -> None:
        """Delete the lease and its keys. Unknown leases are ignored."""
        ...

    async def compact(self, revision: int) -> None:
        """Forget history before ``revision``."""
        ...

    async def close(self) -> None: ...
