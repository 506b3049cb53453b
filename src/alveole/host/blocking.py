"""System calls that may wait for a disk, off the event loop."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(call: Callable[[], T]) -> T:
    """Run ``call`` in a thread. When cancelled, wait for its end first: it never acts after the caller gave up."""
    work = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # looked at, so that it is not reported as forgotten; the caller is told of the cancel
        raise
