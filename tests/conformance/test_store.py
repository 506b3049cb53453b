"""The Store contract, sentence by sentence, for every driver."""

import asyncio

import pytest

from alveole.model.error import AlveoleError, ErrorCode
from alveole.store.base import (
    MAX_OPERATIONS,
    MAX_PAGE,
    MAX_REQUEST_BYTES,
    Compare,
    Delete,
    KeyValue,
    Put,
    Store,
    TxnResult,
    Write,
)
from tests.conformance.store_lab import keys, put, refused, watched

# --- identity, keys and revisions -----------------------------------------------------------------------------------


async def test_id_is_eight_hex_digits(store: Store) -> None:
    assert len(store.id) == 8
    assert int(store.id, 16) >= 0
    assert store.id == store.id.lower()


async def test_a_key_that_was_never_written_is_none(store: Store) -> None:
    assert await store.get("absent") is None


async def test_put_records_revisions_and_versions(store: Store) -> None:
    first = await put(store, "a", b"1")
    other = await put(store, "b", b"x")
    second = await put(store, "a", b"2")
    assert (other, second) == (first + 1, first + 2)
    assert await store.get("a") == KeyValue(
        key="a", value=b"2", create_revision=first, mod_revision=second, version=2, lease=0
    )


async def test_a_key_made_again_begins_anew(store: Store) -> None:
    await put(store, "a")
    await store.txn([], [Delete(key="a")])
    again = await put(store, "a")
    found = await store.get("a")
    assert found is not None
    assert (found.create_revision, found.version) == (again, 1)


async def test_an_empty_value_is_not_a_deletion(store: Store) -> None:
    await put(store, "a", b"")
    found = await store.get("a")
    assert found is not None
    assert found.value == b""


async def test_delete_takes_one_key_only(store: Store) -> None:
    await put(store, "a")
    await put(store, "ab")
    await store.txn([], [Delete(key="a")])
    assert await keys(store) == ["ab"]


async def test_delete_by_prefix_takes_all_below(store: Store) -> None:
    for key in ("a", "a/1", "a/2", "b"):
        await put(store, key)
    await store.txn([], [Delete(key="a/", prefix=True)])
    assert await keys(store) == ["a", "b"]


async def test_every_writing_transaction_makes_one_revision(store: Store) -> None:
    first = await put(store, "a")
    several = await store.txn([], [Put(key="b", value=b""), Put(key="c", value=b""), Delete(key="a")])
    assert several == TxnResult(succeeded=True, revision=first + 1)
    changes = (await watched(store, "", first + 1, 1))[0]
    assert [(change.key, change.revision) for change in changes] == [(key, first + 1) for key in ("b", "c", "a")]


async def test_what_writes_nothing_makes_no_revision(store: Store) -> None:
    first = await put(store, "a")
    for then in ([], [Delete(key="absent")], [Delete(key="absent/", prefix=True)]):
        assert (await store.txn([], then)).revision == first


# --- range ----------------------------------------------------------------------------------------------------------


async def test_range_is_in_byte_order(store: Store) -> None:
    """UTF-8 byte order, also beyond the basic plane, where UTF-16 order differs."""
    unordered = ["p/é", "p/\U0001f41d", "p/\uffee", "p/a", "p/", "p/B", "p/\x00", "p/\U0010ffff", "q", "o"]
    for key in unordered:
        await put(store, key)
    expected = sorted((key for key in unordered if key.startswith("p/")), key=str.encode)
    assert await keys(store, "p/") == expected


async def test_range_of_the_last_characters_has_no_upper_neighbour(store: Store) -> None:
    for key in ("\U0010ffff", "\U0010ffffz", "a"):
        await put(store, key)
    assert await keys(store, "\U0010ffff") == ["\U0010ffff", "\U0010ffffz"]


async def test_range_takes_at_most_limit_and_says_where_to_go_on(store: Store) -> None:
    for key in "abc":
        await put(store, key)
    page = await store.range("", limit=2)
    assert [item.key for item in page.items] == ["a", "b"]
    assert page.next_key == "c"
    last = await store.range("", limit=2, from_key=page.next_key, revision=page.revision)
    assert [item.key for item in last.items] == ["c"]
    assert last.next_key is None


async def test_a_full_last_page_has_no_next(store: Store) -> None:
    await put(store, "a")
    assert (await store.range("", limit=1)).next_key is None


async def test_a_page_never_exceeds_max_page(store: Store) -> None:
    for start in range(0, MAX_PAGE + 1, MAX_OPERATIONS):
        numbers = range(start, min(start + MAX_OPERATIONS, MAX_PAGE + 1))
        await store.txn([], [Put(key=f"k/{number:05}", value=b"") for number in numbers])
    page = await store.range("k/", limit=10 * MAX_PAGE)
    assert len(page.items) == MAX_PAGE
    assert page.next_key == f"k/{MAX_PAGE:05}"


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_page_of_nothing_is_refused(store: Store, limit: int) -> None:
    await refused(lambda: store.range("", limit=limit), ErrorCode.INVALID)


async def test_from_key_before_the_prefix_or_after_it_stays_inside(store: Store) -> None:
    for key in ("a", "b/1", "b/2", "c"):
        await put(store, key)
    assert [item.key for item in (await store.range("b/", from_key="a")).items] == ["b/1", "b/2"]
    assert (await store.range("b/", from_key="c")).items == ()


async def test_pages_at_a_revision_do_not_see_later_writes(store: Store) -> None:
    """Going through pages while keys are changed, deleted and added gives exactly the first page's moment."""
    names = [f"k/{number:02}" for number in range(20)]
    for name in names:
        await put(store, name, b"old")
    page = await store.range("k/", limit=3)
    at = page.revision
    seen = list(page.items)
    while page.next_key is not None:
        await store.txn([], [Put(key=page.next_key, value=b"new"), Put(key=f"{page.next_key}+", value=b"added")])
        await store.txn([], [Delete(key="k/19")])
        page = await store.range("k/", limit=3, from_key=page.next_key, revision=at)
        assert page.revision == at
        seen.extend(page.items)
    assert [(item.key, item.value) for item in seen] == [(name, b"old") for name in names]


async def test_range_at_every_past_revision_is_what_it_was(store: Store) -> None:
    snapshots = {}
    writes: list[Write] = [
        Put(key="a", value=b"1"),
        Put(key="b", value=b"2"),
        Delete(key="a"),
        Put(key="a", value=b"3"),
    ]
    for write in writes:
        revision = (await store.txn([], [write])).revision
        snapshots[revision] = (await store.range("")).items
    for revision, items in snapshots.items():
        assert (await store.range("", revision=revision)).items == items


async def test_a_future_revision_is_refused(store: Store) -> None:
    await refused(lambda: store.range("", revision=1 << 70), ErrorCode.INVALID)


# --- transactions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["create_revision", "mod_revision", "version"])
async def test_an_absent_key_compares_as_zero(store: Store, target: str) -> None:
    absent = Compare(key="a", target=target, value=0)  # type: ignore[arg-type]
    assert (await store.txn([absent], [Put(key="a", value=b"")])).succeeded
    assert not (await store.txn([absent], [Put(key="a", value=b"")])).succeeded


async def test_each_target_is_compared(store: Store) -> None:
    first = await put(store, "a")
    second = await put(store, "a")
    for target, value in (("create_revision", first), ("mod_revision", second), ("version", 2)):
        right = Compare(key="a", target=target, value=value)  # type: ignore[arg-type]
        wrong = Compare(key="a", target=target, value=value + 7)  # type: ignore[arg-type]
        assert (await store.txn([right], [])).succeeded
        assert not (await store.txn([wrong], [])).succeeded
        assert not (await store.txn([right, wrong], [])).succeeded


async def test_a_failed_comparison_does_otherwise_and_only_that(store: Store) -> None:
    exists = Compare(key="a", target="version", value=1)
    result = await store.txn([exists], [Put(key="then", value=b"")], [Put(key="otherwise", value=b"")])
    assert not result.succeeded
    assert await keys(store) == ["otherwise"]
    assert result.revision == (await store.range("")).revision


async def test_a_failed_comparison_without_otherwise_changes_nothing(store: Store) -> None:
    before = await put(store, "a")
    result = await store.txn([Compare(key="a", target="version", value=9)], [Delete(key="a")])
    assert result == TxnResult(succeeded=False, revision=before)
    assert await keys(store) == ["a"]


async def test_concurrent_compare_and_swap_loses_no_update(store: Store) -> None:
    """Twenty tasks each add one, ten times, by compare-and-swap: the sum is exact."""

    async def increment() -> None:
        for _ in range(10):
            succeeded = False
            while not succeeded:
                found = await store.get("n")
                version, number = (found.version, int(found.value)) if found else (0, 0)
                same = Compare(key="n", target="version", value=version)
                await asyncio.sleep(0)
                succeeded = (await store.txn([same], [Put(key="n", value=str(number + 1).encode())])).succeeded

    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(increment())
    found = await store.get("n")
    assert found is not None
    assert (found.value, found.version) == (b"200", 200)


async def test_concurrent_transactions_each_have_their_own_revision(store: Store) -> None:
    revisions = await asyncio.gather(*(put(store, f"k/{number}") for number in range(300)))
    assert sorted(revisions) == list(range(min(revisions), min(revisions) + 300))


async def test_a_refused_transaction_leaves_nothing_and_harms_no_other(store: Store) -> None:
    """A transaction with an unknown lease, waiting together with good ones, changes nothing at all."""
    bad = store.txn([], [Put(key="bad", value=b""), Delete(key="good/0"), Put(key="leased", value=b"", lease=77)])
    *good, refusal = await asyncio.gather(
        *(put(store, f"good/{number}") for number in range(5)), bad, return_exceptions=True
    )
    assert isinstance(refusal, AlveoleError)
    assert refusal.code is ErrorCode.NOT_FOUND
    assert "77" in refusal.message
    assert all(isinstance(revision, int) for revision in good)
    assert await keys(store) == [f"good/{number}" for number in range(5)]


async def test_an_unknown_lease_in_the_branch_not_taken_is_no_error(store: Store) -> None:
    assert (await store.txn([], [], [Put(key="a", value=b"", lease=77)])).succeeded


# --- limits ---------------------------------------------------------------------------------------------------------

_MOST = [Put(key=f"k{number}", value=b"") for number in range(MAX_OPERATIONS)]
_ONE_TOO_MANY = [*_MOST, Put(key="more", value=b"")]


async def test_the_largest_number_of_operations_is_accepted(store: Store) -> None:
    most = [Compare(key=f"k{number}", target="version", value=0) for number in range(MAX_OPERATIONS)]
    assert (await store.txn(most, _MOST, _MOST)).succeeded


@pytest.mark.parametrize("place", ["compare", "then", "otherwise"])
async def test_too_many_operations_are_refused_in_each_list(store: Store, place: str) -> None:
    compare = [Compare(key="k", target="version", value=0)] * (MAX_OPERATIONS + 1 if place == "compare" else 0)
    then = _ONE_TOO_MANY if place == "then" else []
    otherwise = _ONE_TOO_MANY if place == "otherwise" else []
    error = await refused(lambda: store.txn(compare, then, otherwise), ErrorCode.INVALID)
    assert place.removesuffix("e") in error.message
    assert await keys(store) == []


async def test_a_request_may_have_just_max_request_bytes(store: Store) -> None:
    """Keys and values of comparisons and both branches count together."""
    value = b"v" * (MAX_REQUEST_BYTES // 2 - 2)
    compare = [Compare(key="é", target="version", value=0)]
    assert (await store.txn(compare, [Put(key="a", value=value)], [Put(key="b", value=value)])).succeeded
    compare = [Compare(key="éé", target="version", value=0)]
    for both in ([Put(key="a", value=value + b"v")], [Put(key="aa", value=value)]):
        await refused(lambda both=both: store.txn(compare, both, [Put(key="b", value=value)]), ErrorCode.INVALID)  # type: ignore[misc]


@pytest.mark.parametrize(
    "branch",
    [
        [Put(key="a", value=b"1"), Put(key="a", value=b"2")],
        [Put(key="a", value=b"1"), Delete(key="a")],
        [Delete(key="a"), Delete(key="a")],
        [Put(key="a/1", value=b"1"), Delete(key="a/", prefix=True)],
        [Delete(key="", prefix=True), Put(key="z", value=b"")],
        [Delete(key="a/", prefix=True), Delete(key="a/b/", prefix=True)],
    ],
)
async def test_a_branch_may_not_write_a_key_twice(store: Store, branch: list[Write]) -> None:
    await refused(lambda: store.txn([], branch), ErrorCode.INVALID)
    await refused(lambda: store.txn([], [], branch), ErrorCode.INVALID)


async def test_both_branches_may_write_the_same_key(store: Store) -> None:
    assert (await store.txn([], [Put(key="a", value=b"")], [Delete(key="a")])).succeeded


@pytest.mark.parametrize("key", ["", "\ud800"])
async def test_keys_without_utf8_form_are_refused_everywhere(store: Store, key: str) -> None:
    for call in (
        lambda: store.get(key),
        lambda: store.txn([Compare(key=key, target="version", value=0)], []),
        lambda: store.txn([], [Put(key=key, value=b"")]),
        lambda: store.txn([], [], [Delete(key=key)]),
    ):
        await refused(call, ErrorCode.INVALID)


async def test_prefixes_without_utf8_form_are_refused(store: Store) -> None:
    await refused(lambda: store.range("\ud800"), ErrorCode.INVALID)
    await refused(lambda: store.range("a", from_key="b\udfff"), ErrorCode.INVALID)
    await refused(lambda: watched(store, "\ud800", 1, 1), ErrorCode.INVALID)
    await refused(lambda: store.txn([], [Delete(key="\ud800", prefix=True)]), ErrorCode.INVALID)
