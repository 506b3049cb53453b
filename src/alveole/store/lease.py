"""Lease deadlines, kept in memory: a driver stores which leases exist, this says when each ends."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from alveole.model.error import AlveoleError, not_found
from alveole.store.base import Lease

EXPIRY_TICK_S = 0.5  # how late an expiry may be noticed; leases are whole seconds

_log = logging.getLogger(__name__)


class Leases:
    """Every lease that may exist. A lease is entered before it is stored and left out only after it is deleted there,
    so that one whose maker was interrupted in between still expires.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        revoke: Callable[[int], Awaitable[None]],
        *,
        held: Iterable[Lease] = (),
        last_id: int = 0,
    ) -> None:
        self._clock = clock
        self._revoke = revoke
        self._last_id = last_id
        self._leases: dict[int, Lease] = {}
        self._deadlines: dict[int, float] = {}
        self._expiring: asyncio.Task[None] | None = None
        for lease in held:
            self._enter(lease)

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._leases

    def __len__(self) -> int:
        return len(self._leases)

    def allot(self, ttl_s: int) -> Lease:
        """A lease under an id never used before, its time running."""
        self._last_id += 1
        lease = Lease(id=self._last_id, ttl_s=ttl_s)
        self._enter(lease)
        return lease

    def keep(self, lease_id: int) -> None:
        if self._clock() >= self._deadlines.get(lease_id, float("-inf")):
            raise not_found(f"lease {lease_id} has expired or was revoked", hint="grant a new lease")
        self._deadlines[lease_id] = self._clock() + self._leases[lease_id].ttl_s

    def end(self, lease_id: int) -> None:
        """From now on it cannot be kept; it is revoked at the next tick if its caller does not come to it."""
        if lease_id in self._leases:
            self._deadlines[lease_id] = float("-inf")

    def forget(self, lease_id: int) -> None:
        self._leases.pop(lease_id, None)
        self._deadlines.pop(lease_id, None)

    async def expire_due(self) -> None:
        """Revoke what is past its deadline. What cannot be revoked now (a full disk) stays due."""
        now = self._clock()
        due = sorted((deadline, lease_id) for lease_id, deadline in self._deadlines.items() if deadline <= now)
        for _, lease_id in due:
            try:
                await self._revoke(lease_id)
            except AlveoleError as error:
                _log.warning("lease %d has expired but its keys cannot be deleted yet: %s", lease_id, error)

    async def close(self) -> None:
        if self._expiring is not None:
            self._expiring.cancel()
            await asyncio.wait({self._expiring})

    def _enter(self, lease: Lease) -> None:
        self._leases[lease.id] = lease
        self._deadlines[lease.id] = self._clock() + lease.ttl_s
        if self._expiring is None or self._expiring.done():
            self._expiring = asyncio.get_running_loop().create_task(self._expire_until_none())

    async def _expire_until_none(self) -> None:
        while self._leases:
            await asyncio.sleep(EXPIRY_TICK_S)
            await self.expire_due()
