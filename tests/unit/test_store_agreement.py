"""The two drivers, written apart, answer any sequence of requests alike: each checks the other."""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from alveole.model.error import AlveoleError
from alveole.store.base import Change, Compare, Delete, Put, Write
from alveole.store.local import LocalStore
from alveole.store.memory import MemoryStore
from alveole.store.sqlite import SqliteStore

Request = Callable[[LocalStore], Coroutine[Any, Any, object]]


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


END = [Put(key="a/end", value=b""), Put(key="b/end", value=b"")]  # below every prefix that is watched
KEYS = st.sampled_from(["a", "a/", "a/1", "a/2", "a/\x00", "b", "b/1", "é", "\U0010ffff", "\U0010ffff/1"])
PREFIXES = st.sampled_from(["", "a", "a/", "b", "é", "\U0010ffff", "absent"])
REVISIONS = st.integers(-1, 40)
LEASES = st.sampled_from([1, 1, 1, 2, 3])
WRITES = st.one_of(
    st.builds(Put, key=KEYS, value=st.binary(max_size=3)),
    st.builds(Put, key=KEYS, value=st.binary(max_size=3), lease=LEASES),
    st.builds(Delete, key=KEYS),
    st.builds(Delete, key=PREFIXES, prefix=st.just(True)),
)
COMPARES = st.builds(
    Compare,
    key=KEYS,
    target=st.sampled_from(["create_revision", "mod_revision", "version"]),
    value=st.integers(0, 6),
)


def transaction(compare: list[Compare], then: list[Write], otherwise: list[Write]) -> Request:
    return lambda store: store.txn(compare, then, otherwise)


def page(prefix: str, limit: int, from_key: str | None, revision: int | None) -> Request:
    return lambda store: store.range(prefix, limit=limit, from_key=from_key, revision=revision)


def passing(seconds: int) -> Request:
    async def pass_time(store: LocalStore) -> None:
        clock = store._leases._clock
        assert isinstance(clock, Clock)
        clock.now_s += seconds
        await store._leases.expire_due()

    return pass_time


def distinct(most: int) -> st.SearchStrategy[list[Write]]:
    return st.lists(WRITES, min_size=1, max_size=most, unique_by=lambda write: write.key)


WRITING = st.builds(transaction, st.just([]), distinct(6), st.just([]))
REQUESTS = st.one_of(
    WRITING,
    WRITING,
    WRITING,
    st.builds(transaction, st.lists(COMPARES, max_size=2), distinct(3), distinct(3)),
    st.builds(transaction, st.just([]), st.lists(WRITES, max_size=3), st.just([])),
    KEYS.map(lambda key: lambda store: store.get(key)),
    st.builds(page, PREFIXES, st.integers(1, 4), st.none() | KEYS, st.none() | REVISIONS),
    REVISIONS.map(lambda revision: lambda store: store.compact(revision)),
    st.integers(1, 9).map(lambda ttl_s: lambda store: store.grant_lease(ttl_s)),
    st.integers(1, 4).map(lambda lease_id: lambda store: store.keep_lease(lease_id)),
    st.integers(1, 4).map(lambda lease_id: lambda store: store.revoke_lease(lease_id)),
    st.integers(1, 3).map(passing),
)


async def grant(store: LocalStore) -> object:
    """Comes first, so that lease 1 exists for a while."""
    return await store.grant_lease(6)


async def answer(store: LocalStore, request: Request) -> object:
    try:
        return await request(store)
    except AlveoleError as error:
        return error.code, error.message


async def history(store: LocalStore, prefix: str, from_revision: int) -> object:
    """What a watcher of ``prefix`` gets up to the END transaction."""

    async def follow(_: LocalStore) -> list[tuple[Change, ...]]:
        seen: list[tuple[Change, ...]] = []
        async with asyncio.timeout(10):
            async for changes in store.watch(prefix, from_revision):
                seen.append(changes)
                if changes[-1].key == END[-1].key:
                    break
        return seen

    return await answer(store, follow)


async def compare_drivers(requests: list[Request], directory: Path) -> None:
    model, real = MemoryStore(Clock()), await SqliteStore.open(directory / "store", Clock())
    try:
        live = [asyncio.create_task(history(store, "", 0)) for store in (model, real)]
        await asyncio.sleep(0)
        for request in [grant, *requests]:
            assert await answer(model, request) == await answer(real, request)
        ends = [await store.txn([], END) for store in (model, real)]
        assert ends[0] == ends[1]
        for revision in range(ends[0].revision + 1):
            for prefix in ("", "b"):
                past = page(prefix, 1000, None, revision)
                assert await answer(model, past) == await answer(real, past)
                told = [await history(store, prefix, revision) for store in (model, real)]
                assert told[0] == told[1]
        assert await live[0] == await live[1]
    finally:
        await model.close()
        await real.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(REQUESTS, min_size=12, max_size=40))
def test_both_drivers_answer_and_tell_the_same(requests: list[Request]) -> None:
    """Answers, errors, every past revision still kept, and every watch from every revision are equal."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(compare_drivers(requests, Path(directory)))
