"""What tests ask of the daemon by its environment: to die at a step, and to tell when its event loop was held up.

``ALVEOLE_TEST_KILL_AT=FILE`` ends the process with SIGKILL at the point that the file names, once it exists:
``start:network:after``, or ``commit:before#3`` for the third time that it comes there since the file was written.
``ALVEOLE_TEST_TRACE=FILE`` appends every such point to a file.
``ALVEOLE_TEST_LOOP_LIMIT_MS=20`` logs an error for each callback that held the event loop longer.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from alveole.agent.steps import FaultHook, no_fault
from alveole.store.base import Store, TxnResult

log = logging.getLogger(__name__)


def fault_hook() -> FaultHook:
    target, trace = os.environ.get("ALVEOLE_TEST_KILL_AT"), os.environ.get("ALVEOLE_TEST_TRACE")
    if not target and not trace:
        return no_fault
    seen: Counter[str] = Counter()
    written_ns = 0

    def hook(point: str) -> None:
        if trace:
            with Path(trace).open("a") as file:
                file.write(f"{point}\n")
        nonlocal written_ns
        if not target or not Path(target).exists():
            return
        if Path(target).stat().st_mtime_ns != written_ns:
            written_ns = Path(target).stat().st_mtime_ns
            seen.clear()
        seen[point] += 1
        wanted, _, times = Path(target).read_text().partition("#")
        if point == wanted and seen[point] == int(times or 1):
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def watch_commits(store: Store, hook: FaultHook) -> None:
    """Make each commit of the store two such points."""
    if hook is no_fault:
        return
    original = store.txn

    async def txn(*transaction: Any) -> TxnResult:
        hook("commit:before")
        result = await original(*transaction)
        hook("commit:after")
        return result

    setattr(store, "txn", txn)  # noqa: B010  (what type checkers rightly dislike)


def guard_loop() -> None:
    """Time every callback of the event loop, if a limit was asked for, and tell where those stood that broke it.

    Time that the kernel let others run meanwhile is not the callback's: it is subtracted.
    """
    limit_ms = float(os.environ.get("ALVEOLE_TEST_LOOP_LIMIT_MS", "0"))
    if not limit_ms:
        return
    original = asyncio.events.Handle._run
    sampler = _Sampler(limit_ms / 1000)
    sampler.start()

    def run(handle: asyncio.Handle) -> None:
        waited, began = _waited_ns(), time.monotonic_ns()
        sampler.began(began)
        original(handle)
        held_ms = (time.monotonic_ns() - began - (_waited_ns() - waited)) / 1e6
        stack = sampler.ended()
        # Without a stack the sampler stood still too: the host's doing, not the callback's.
        if held_ms > limit_ms and stack and not _is_spawning(stack):
            log.error("event loop held for %.1f ms by %r at:\n%s", held_ms, handle, stack)

    setattr(asyncio.events.Handle, "_run", run)  # noqa: B010  (what type checkers rightly dislike)


class _Sampler(threading.Thread):
    """Looks at the loop's thread when a callback has run for the limit."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(daemon=True, name="loop-sampler")
        self._limit_s = limit_s
        self._loop_thread = threading.get_ident()
        self._began_ns = 0
        self._stack = ""

    def began(self, now_ns: int) -> None:
        self._began_ns, self._stack = now_ns, ""

    def ended(self) -> str:
        self._began_ns = 0
        return self._stack

    def run(self) -> None:
        while True:
            time.sleep(self._limit_s / 4)
            began_ns = self._began_ns
            if began_ns and not self._stack and time.monotonic_ns() - began_ns > self._limit_s * 1e9:
                frame = sys._current_frames().get(self._loop_thread)
                self._stack = "".join(traceback.format_stack(frame)[-6:])


def _is_spawning(stack: str) -> bool:
    """Whether it waits, in vfork, for its child to be given a processor: on a busy host that takes what it takes."""
    return "_fork_exec(" in stack.rstrip().rpartition("\n")[2]


def _waited_ns() -> int:
    """How long this thread was ready to run but did not, in all (Documentation/scheduler/sched-stats.rst)."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
