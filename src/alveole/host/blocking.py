"""What a cancel must not cut short: system calls that may wait for a disk, and what would be left half done."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(call: Callable[[], T]) -> T:
    """Run ``call`` in a thread. When cancelled, wait for its end first: it never acts after the caller gave up."""
    return await to_its_end(asyncio.to_thread(call))


async def to_its_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await it. When cancelled, wait for its end first."""
    work = asyncio.ensure_future(coroutine)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # looked at, so that it is not reported as forgotten; the caller is told of the cancel
        raise
