"""The stores that the conformance suite runs against, and what its tests share."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from alveole.model.error import AlveoleError, ErrorCode
from alveole.store.base import Change, Put, Store


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def put(store: Store, key: str, value: bytes = b"v", lease: int = 0) -> int:
    return (await store.txn([], [Put(key=key, value=value, lease=lease)])).revision


async def watched(store: Store, prefix: str, from_revision: int, count: int) -> list[tuple[Change, ...]]:
    """The first ``count`` tuples a new watcher gets."""
    seen = []
    async with asyncio.timeout(10):
        async for changes in store.watch(prefix, from_revision):
            seen.append(changes)
            if len(seen) == count:
                break
    return seen


async def refused(call: Callable[[], Awaitable[object]], code: ErrorCode) -> AlveoleError:
    with pytest.raises(AlveoleError) as caught:
        await call()
    assert caught.value.code is code
    return caught.value


async def keys(store: Store, prefix: str = "", revision: int | None = None) -> list[str]:
    return [item.key for item in (await store.range(prefix, revision=revision)).items]
