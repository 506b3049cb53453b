"""The Store contract, sentence by sentence, for every driver: watches, compaction, leases, close."""

import asyncio

import pytest

from alveole.model.error import AlveoleError, ErrorCode
from alveole.store.base import (
    KEPT_REVISIONS,
    Change,
    Delete,
    Put,
    Store,
)
from alveole.store.local import LocalStore
from alveole.store.watch import MAX_WAITING_REVISIONS
from tests.conformance.store_lab import Clock, keys, put, refused, watched

# --- watch ----------------------------------------------------------------------------------------------------------


async def test_watch_replays_the_past_then_goes_on_live(store: Store) -> None:
    first = await put(store, "k/a", b"1")
    await put(store, "other")
    await store.txn([], [Delete(key="k/a")])
    watching = asyncio.create_task(watched(store, "k/", first, 3))
    await asyncio.sleep(0.02)
    live = await put(store, "k/b", b"2")
    seen = [changes[0] for changes in await watching]
    assert [(change.key, change.revision) for change in seen] == [
        ("k/a", first),
        ("k/a", first + 2),
        ("k/b", live),
    ]
    assert seen[0].value is not None
    assert (seen[0].value.value, seen[1].value) == (b"1", None)
    assert seen[2].value == await store.get("k/b")


async def test_watch_from_a_revision_leaves_earlier_ones_out(store: Store) -> None:
    await put(store, "a")
    second = await put(store, "b")
    assert [change.key for (change,) in await watched(store, "", second, 1)] == ["b"]


async def test_watch_from_a_future_revision_waits_for_it(store: Store) -> None:
    now = await put(store, "a")
    watching = asyncio.create_task(watched(store, "", now + 2, 1))
    await asyncio.sleep(0.02)
    await put(store, "b")
    await put(store, "c")
    assert (await watching)[0][0].key == "c"


async def test_a_tuple_holds_a_whole_revision(store: Store) -> None:
    """Both in replay and live, what was written together is told together, without other prefixes."""
    writes = [Put(key=f"k/{number}", value=b"") for number in range(50)]
    start = (await store.txn([], [*writes, Put(key="other", value=b"")])).revision
    watching = asyncio.create_task(watched(store, "k/", start, 2))
    await asyncio.sleep(0.02)
    await store.txn([], [Delete(key="k/", prefix=True)])
    replayed, live = await watching
    assert [change.key for change in replayed] == [write.key for write in writes]
    assert [change.key for change in live] == sorted(write.key for write in writes)
    assert {change.revision for change in live} == {start + 1}


async def test_many_watchers_joining_while_writes_go_on_see_all_once(store: Store) -> None:
    """Watchers that begin at any moment of a storm of writes get every revision, in order, none doubled."""
    start = await put(store, "k/first")
    total = 600
    watching = []

    async def write() -> None:
        for _ in range(total // 4):
            await put(store, "k/n")

    async def join() -> None:
        for _ in range(20):
            watching.append(asyncio.create_task(watched(store, "k/", start, total + 1)))
            await asyncio.sleep(0.001)

    await asyncio.gather(write(), write(), join(), write(), write())
    for seen in await asyncio.gather(*watching):
        assert [changes[0].revision for changes in seen] == list(range(start, start + total + 1))


async def test_a_watcher_too_far_behind_is_told_gone(store: Store) -> None:
    """It is dropped for not reading; another that reads is not."""
    start = await put(store, "k")
    slow, quick = store.watch("", start), asyncio.create_task(watched(store, "", start, MAX_WAITING_REVISIONS + 2))
    await anext(slow)
    behind = asyncio.ensure_future(anext(slow))
    await asyncio.sleep(0.02)
    for _ in range(MAX_WAITING_REVISIONS + 1):
        await put(store, "k")
        await asyncio.sleep(0)
    await behind
    assert len(await quick) == MAX_WAITING_REVISIONS + 2
    for _ in range(MAX_WAITING_REVISIONS + 1):
        await put(store, "k")
    error = await refused(lambda: anext(slow), ErrorCode.GONE)
    assert error.hint


async def test_cancelling_a_watch_leaves_no_watcher(store: Store) -> None:
    watching = [asyncio.create_task(watched(store, "", 1, 1)) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert isinstance(store, LocalStore)
    assert len(store._watchers) == 5
    for task in watching:
        task.cancel()
    await asyncio.wait(watching)
    assert len(store._watchers) == 0


# --- compaction -----------------------------------------------------------------------------------------------------


async def test_compaction_forgets_the_past_only(store: Store) -> None:
    """Before it GONE; at it and after it ranges and watches are whole; current values stay."""
    first = await put(store, "a", b"1")
    await put(store, "untouched")
    await put(store, "a", b"2")
    await store.txn([], [Delete(key="a")])
    at = await put(store, "b")
    before = (await store.range("")).items
    await put(store, "c")
    await store.compact(at)
    for gone in (first, at - 1, 0):
        await refused(lambda gone=gone: store.range("", revision=gone), ErrorCode.GONE)  # type: ignore[misc]
        error = await refused(lambda gone=gone: watched(store, "", gone, 1), ErrorCode.GONE)  # type: ignore[misc]
        assert str(at) in error.message
    assert (await store.range("", revision=at)).items == before
    assert [change.key for (change,) in await watched(store, "", at, 2)] == ["b", "c"]
    assert await keys(store) == ["b", "c", "untouched"]


async def test_compacting_twice_or_backwards_changes_nothing(store: Store) -> None:
    await put(store, "a")
    at = await put(store, "b")
    await store.compact(at)
    await store.compact(at)
    await store.compact(at - 1)
    assert [change.key for (change,) in await watched(store, "", at, 1)] == ["b"]


async def test_compacting_the_future_is_refused(store: Store) -> None:
    await refused(lambda: store.compact(1 << 70), ErrorCode.INVALID)


async def test_a_deletion_at_the_compacted_revision_is_still_told(store: Store) -> None:
    await put(store, "a")
    at = (await store.txn([], [Delete(key="a")])).revision
    await put(store, "b")
    await store.compact(at)
    (deleted,), _ = await watched(store, "", at, 2)
    assert deleted == Change(key="a", value=None, revision=at)
    await store.compact(at + 1)
    assert await keys(store, revision=at + 1) == ["b"]


async def test_the_store_compacts_itself_and_keeps_enough(store: Store) -> None:
    """Ever more writes: the oldest go, at least KEPT_REVISIONS stay, keys not written for long stay."""
    await put(store, "old")
    for _ in range(12):
        await asyncio.gather(*(put(store, f"k/{number % 7}") for number in range(1000)))
    now = (await store.range("")).revision
    await refused(lambda: store.range("", revision=3), ErrorCode.GONE)
    kept = await store.range("", revision=now - KEPT_REVISIONS)
    assert [item.key for item in kept.items] == [*(f"k/{number}" for number in range(7)), "old"]
    seen = await watched(store, "", now - KEPT_REVISIONS, KEPT_REVISIONS + 1)
    assert [changes[0].revision for changes in seen] == list(range(now - KEPT_REVISIONS, now + 1))


# --- leases ---------------------------------------------------------------------------------------------------------


async def test_expiry_deletes_all_keys_of_the_lease_as_one_revision(store: Store, clock: Clock) -> None:
    lease = await store.grant_lease(10)
    assert lease.ttl_s == 10
    await put(store, "a", lease=lease.id)
    before = await put(store, "b", lease=lease.id)
    await put(store, "free")
    clock.now_s += 9.9
    await asyncio.sleep(0.05)
    assert await keys(store) == ["a", "b", "free"]
    clock.now_s += 0.1
    (_, deleted) = await watched(store, "", before + 1, 2)
    assert [(change.key, change.value) for change in deleted] == [("a", None), ("b", None)]
    assert await keys(store) == ["free"]
    await refused(lambda: store.keep_lease(lease.id), ErrorCode.NOT_FOUND)
    await refused(lambda: put(store, "c", lease=lease.id), ErrorCode.NOT_FOUND)


async def test_a_key_names_its_lease(store: Store) -> None:
    lease = await store.grant_lease(10)
    await put(store, "a", lease=lease.id)
    found = await store.get("a")
    assert found is not None
    assert found.lease == lease.id


async def test_keeping_a_lease_renews_its_whole_time(store: Store, clock: Clock) -> None:
    lease = await store.grant_lease(10)
    await put(store, "a", lease=lease.id)
    for _ in range(3):
        clock.now_s += 9
        await asyncio.sleep(0.03)
        await store.keep_lease(lease.id)
    assert await keys(store) == ["a"]


async def test_a_lease_past_its_time_cannot_be_kept_even_before_its_keys_are_gone(store: Store, clock: Clock) -> None:
    """Nobody may renew late: another may already act on the expiry."""
    lease = await store.grant_lease(1)
    clock.now_s += 1
    await refused(lambda: store.keep_lease(lease.id), ErrorCode.NOT_FOUND)


async def test_a_key_put_again_without_the_lease_outlives_it(store: Store) -> None:
    lease = await store.grant_lease(10)
    await put(store, "a", lease=lease.id)
    await put(store, "a")
    await store.revoke_lease(lease.id)
    assert await keys(store) == ["a"]


async def test_a_key_moved_to_another_lease_follows_that(store: Store) -> None:
    one, two = await store.grant_lease(10), await store.grant_lease(10)
    assert one.id != two.id
    await put(store, "a", lease=one.id)
    await put(store, "a", lease=two.id)
    await store.revoke_lease(one.id)
    assert await keys(store) == ["a"]
    await store.revoke_lease(two.id)
    assert await keys(store) == []


async def test_revoking_deletes_the_keys_as_one_revision(store: Store) -> None:
    lease = await store.grant_lease(10)
    await put(store, "a", lease=lease.id)
    before = await put(store, "b", lease=lease.id)
    await store.revoke_lease(lease.id)
    assert len((await watched(store, "", before + 1, 1))[0]) == 2
    await refused(lambda: store.keep_lease(lease.id), ErrorCode.NOT_FOUND)


async def test_an_interrupted_revocation_is_not_forgotten(store: Store) -> None:
    """From its first moment the lease cannot be kept, and it goes although its caller was cancelled."""
    lease = await store.grant_lease(10)
    await put(store, "a", lease=lease.id)
    revoking = asyncio.create_task(store.revoke_lease(lease.id))
    await asyncio.sleep(0)
    revoking.cancel()
    await refused(lambda: store.keep_lease(lease.id), ErrorCode.NOT_FOUND)
    await asyncio.wait([revoking])
    assert isinstance(store, LocalStore)
    await store._leases.expire_due()
    assert await keys(store) == []
    assert len(store._leases) == 0


async def test_expiry_goes_on_after_a_time_without_leases(store: Store, clock: Clock) -> None:
    await store.revoke_lease((await store.grant_lease(10)).id)
    await asyncio.sleep(0.05)
    lease = await store.grant_lease(10)
    before = await put(store, "a", lease=lease.id)
    clock.now_s += 10
    assert (await watched(store, "", before + 1, 1))[0][0].value is None


@pytest.mark.parametrize("lease_id", [0, 999, -1, 1 << 70])
async def test_revoking_an_unknown_lease_is_ignored(store: Store, lease_id: int) -> None:
    before = await put(store, "a")
    await store.revoke_lease(lease_id)
    assert (await store.range("")).revision == before


async def test_a_revoked_lease_without_keys_makes_no_revision(store: Store) -> None:
    before = await put(store, "a")
    await store.revoke_lease((await store.grant_lease(10)).id)
    assert (await store.range("")).revision == before


@pytest.mark.parametrize("ttl_s", [0, -1, 1.5, 1 << 62])
async def test_a_lease_is_whole_seconds(store: Store, ttl_s: int) -> None:
    await refused(lambda: store.grant_lease(ttl_s), ErrorCode.INVALID)


@pytest.mark.parametrize("lease_id", [-1, 1 << 63])
async def test_a_lease_id_out_of_range_is_refused(store: Store, lease_id: int) -> None:
    await refused(lambda: put(store, "a", lease=lease_id), ErrorCode.INVALID)


async def test_an_interrupted_grant_leaves_no_lease_for_ever(store: Store, clock: Clock) -> None:
    """Cancelled before it could learn its lease, the caller leaves one that still expires."""
    granting = asyncio.create_task(store.grant_lease(1))
    await asyncio.sleep(0)
    granting.cancel()
    await asyncio.wait([granting])
    clock.now_s += 1
    assert isinstance(store, LocalStore)
    await store._leases.expire_due()
    assert len(store._leases) == 0


# --- close ----------------------------------------------------------------------------------------------------------


async def test_a_closed_store_gives_no_answer_and_ends_its_watchers(store: Store) -> None:
    await store.grant_lease(5)
    watching = asyncio.create_task(watched(store, "", 1, 1))
    await asyncio.sleep(0.02)
    await store.close()
    await store.close()
    with pytest.raises(AlveoleError, match="closed") as caught:
        await watching
    assert caught.value.code is ErrorCode.UNAVAILABLE
    for call in (
        lambda: store.get("a"),
        lambda: store.range(""),
        lambda: put(store, "a"),
        lambda: store.grant_lease(1),
        lambda: store.keep_lease(1),
        lambda: store.revoke_lease(1),
        lambda: store.compact(1),
        lambda: watched(store, "", 1, 1),
    ):
        await refused(call, ErrorCode.UNAVAILABLE)


async def test_writes_under_way_are_finished_by_close(store: Store) -> None:
    writing = [asyncio.create_task(put(store, f"k/{number}")) for number in range(400)]
    await asyncio.sleep(0)
    await store.close()
    assert len(set(await asyncio.gather(*writing))) == 400
