"""Time that passes only when everybody waits for it: hours take milliseconds, and runs are repeatable."""

import asyncio
import functools
import random
import selectors
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, ParamSpec

P = ParamSpec("P")
REAL_WAIT_S = 10.0
LIMIT_S = 24 * 3600.0
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class _Selector(selectors.DefaultSelector):
    """Never sleeps: waiting moves the loop's time."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            ready = super().select(REAL_WAIT_S)  # for a thread
            if not ready:
                raise RuntimeError("everybody waits, and nothing will ever happen")
        elif not ready and timeout is not None:
            self.now_s += max(timeout, 0.0)
            if self.now_s > LIMIT_S:
                raise RuntimeError("a whole day has passed, and the test still waits")
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


class VirtualClock:
    """``alveole.model.clock.Clock`` on the running loop's time, with an offset that a test may change."""

    offset_s = 0.0

    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=self.monotonic())

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + self.offset_s


class SeededIds:
    """``alveole.model.clock.Ids`` that are the same for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def hex(self, digits: int) -> str:
        return f"{self._random.getrandbits(4 * digits):0{digits}x}"
