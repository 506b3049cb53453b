"""Where history ends and live begins: the moments no storm of writes hits reliably."""

import asyncio

from alveole.store.base import Change
from alveole.store.watch import Changes, History, Watchers


def revision(number: int) -> Changes:
    return (Change(key="k", value=None, revision=number),)


async def take(watchers: Watchers, read: object, count: int) -> list[int]:
    seen = []
    async with asyncio.timeout(5):
        async for changes in watchers.follow("k", 1, read):  # type: ignore[arg-type]
            seen.append(changes[0].revision)
            if len(seen) == count:
                break
    return seen


async def test_a_commit_while_history_is_read_is_told_once_whether_history_has_it_or_not() -> None:
    """Revision 3 is committed before the read, but told after; revision 4 is committed after the read."""
    watchers = Watchers()

    async def read(_: str, __: int) -> History:
        watchers.publish([revision(3), revision(4)])
        return History(revisions=(revision(2), revision(3)), next_revision=4, complete=True)

    assert await take(watchers, read, 3) == [2, 3, 4]


async def test_history_is_read_in_parts_until_it_is_complete() -> None:
    watchers = Watchers()
    asked = []

    async def read(_: str, first: int) -> History:
        asked.append(first)
        return History(revisions=(revision(first),), next_revision=first + 10, complete=first == 21)

    assert await take(watchers, read, 3) == [1, 11, 21]
    assert asked == [1, 11, 21]
