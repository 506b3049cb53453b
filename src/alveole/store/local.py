"""What the drivers that keep all state on this machine share: request checks, lease deadlines, fan-out to watchers."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from alveole.model.error import unavailable
from alveole.store.base import MAX_PAGE, Compare, KeyValue, Lease, Page, TxnResult, Write
from alveole.store.lease import Leases
from alveole.store.limits import check_key, check_prefix, check_ttl, check_txn, page_size
from alveole.store.watch import Changes, History, Watchers


class LocalStore(ABC):
    """The public half of the Store contract. A driver adds the methods that begin with an underscore: they get
    requests that were checked, and publish to ``_watchers`` what they commit.
    """

    def __init__(
        self, store_id: str, clock: Callable[[], float], *, held: Iterable[Lease] = (), last_lease_id: int = 0
    ) -> None:
        self._id = store_id
        self._closed = False
        self._watchers = Watchers()
        self._leases = Leases(clock, self.revoke_lease, held=held, last_id=last_lease_id)

    @property
    def id(self) -> str:
        return self._id

    async def get(self, key: str) -> KeyValue | None:
        check_key(key)
        self._check_open()
        return await self._get(key)

    async def range(
        self, prefix: str, *, limit: int = MAX_PAGE, from_key: str | None = None, revision: int | None = None
    ) -> Page:
        check_prefix(prefix)
        start = max(prefix, from_key or "")
        check_prefix(start)
        size = page_size(limit)
        self._check_open()
        return await self._range(prefix, start, size, revision)

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], otherwise: Sequence[Write] = ()
    ) -> TxnResult:
        check_txn(compare, then, otherwise)
        self._check_open()
        return await self._txn(compare, then, otherwise)

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Changes, None]:
        check_prefix(prefix)
        return self._watchers.follow(prefix, from_revision, self._read_history)

    async def grant_lease(self, ttl_s: int) -> Lease:
        check_ttl(ttl_s)
        self._check_open()
        lease = self._leases.allot(ttl_s)
        await self._grant(lease)
        return lease

    async def keep_lease(self, lease_id: int) -> None:
        self._check_open()
        self._leases.keep(lease_id)

    async def revoke_lease(self, lease_id: int) -> None:
        self._check_open()
        if lease_id in self._leases:
            self._leases.end(lease_id)
            await self._revoke(lease_id)
            self._leases.forget(lease_id)

    async def compact(self, revision: int) -> None:
        self._check_open()
        await self._compact(revision)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._leases.close()
        self._watchers.close(unavailable(f"store {self._id} was closed"))
        await self._shut()

    async def _read_history(self, prefix: str, first_revision: int) -> History:
        self._check_open()
        return await self._history(prefix, first_revision)

    def _check_open(self) -> None:
        if self._closed:
            raise unavailable(f"store {self._id} is closed", hint="start the daemon again")

    @abstractmethod
    async def _get(self, key: str) -> KeyValue | None: ...

    @abstractmethod
    async def _range(self, prefix: str, start: str, size: int, revision: int | None) -> Page: ...

    @abstractmethod
    async def _txn(
        self, compare: Sequence[Compare], then: Sequence[Write], otherwise: Sequence[Write]
    ) -> TxnResult: ...

    @abstractmethod
    async def _history(self, prefix: str, first_revision: int) -> History: ...

    @abstractmethod
    async def _grant(self, lease: Lease) -> None: ...

    @abstractmethod
    async def _revoke(self, lease_id: int) -> None: ...

    @abstractmethod
    async def _compact(self, revision: int) -> None: ...

    @abstractmethod
    async def _shut(self) -> None: ...
