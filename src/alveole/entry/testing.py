"""What tests ask of the daemon by its environment: to die at a step, and to tell when its event loop was held up.

``ALVEOLE_TEST_KILL_AT=start:network:after`` ends the process with SIGKILL at that point.
``ALVEOLE_TEST_TRACE=FILE`` appends every such point to a file.
``ALVEOLE_TEST_LOOP_LIMIT_MS=20`` logs an error for each callback that held the event loop longer.
"""

import asyncio
import logging
import os
import signal
import time
from pathlib import Path

from alveole.agent.steps import FaultHook, no_fault

log = logging.getLogger(__name__)


def fault_hook() -> FaultHook:
    target, trace = os.environ.get("ALVEOLE_TEST_KILL_AT"), os.environ.get("ALVEOLE_TEST_TRACE")
    if not target and not trace:
        return no_fault

    def hook(point: str) -> None:
        if trace:
            with Path(trace).open("a") as file:
                file.write(f"{point}\n")
        if point == target:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def guard_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Time the processor and wall clock time of every callback, if a limit was asked for.

    Time that the kernel let others run meanwhile is not the callback's: it is subtracted.
    """
    limit_ms = float(os.environ.get("ALVEOLE_TEST_LOOP_LIMIT_MS", "0"))
    if not limit_ms:
        return
    original = asyncio.events.Handle._run

    def run(handle: asyncio.Handle) -> None:
        waited, began = _waited_ns(), time.monotonic_ns()
        original(handle)
        held_ms = (time.monotonic_ns() - began - (_waited_ns() - waited)) / 1e6
        if held_ms > limit_ms:
            log.error("event loop held for %.1f ms by %r", held_ms, handle)

    setattr(asyncio.events.Handle, "_run", run)  # noqa: B010  (what type checkers rightly dislike)
    loop.set_debug(False)


def _waited_ns() -> int:
    """How long this thread was ready to run but did not, in all (Documentation/scheduler/sched-stats.rst)."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
