"""Processes that are not our children: recognised by pid and start time, signalled and waited for without a race."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from alveole.host.ready import wait_readable

_ENDED = frozenset("ZXx")


def started_at(pid: int) -> int | None:
    """When the process began, in clock ticks since boot (/proc/PID/stat field 22); None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    return None if fields[0] in _ENDED else int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Whether this very process still runs; a zombie does not."""
    return started_at(pid) == started


def send(pid: int, started: int, number: int) -> None:
    """Signal this very process; fine if it has ended."""
    descriptor = _open(pid, started)
    if descriptor is None:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)


async def wait_ended(pid: int, started: int) -> None:
    """Wait until this very process has ended, whoever its parent is."""
    descriptor = _open(pid, started)
    if descriptor is None:
        return
    try:
        await wait_readable(descriptor)
    finally:
        os.close(descriptor)


def with_arguments(*arguments: str, among: tuple[int, ...] | None = None) -> tuple[tuple[int, int], ...]:
    """(pid, start time) of live processes whose argv holds all of ``arguments``; of all pids unless ``among``."""
    wanted = {os.fsencode(argument) for argument in arguments}
    found = []
    for pid in among if among is not None else _all_pids():
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if wanted <= set(argv) and (started := started_at(pid)) is not None:
            found.append((pid, started))
    return tuple(found)


def _all_pids() -> tuple[int, ...]:
    return tuple(int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208  (names only, thousands)


def _open(pid: int, started: int) -> int | None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if is_alive(pid, started):  # looked at after opening: from here on the pid cannot be reused unnoticed
        return descriptor
    os.close(descriptor)
    return None
