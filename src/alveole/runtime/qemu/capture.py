"""What a machine is at one moment, taken while it stands still; and another machine going on from there.

Two files: the private pages of its memory, at their offsets in a sparse file, and the state of its devices. Whoever
goes on maps the same file as memory that the first had mapped, and has the same shape.

xen-save-devices-state is the one command of QEMU's that saves devices without memory when memory is a private mapping;
what it writes has no configuration section, so whoever loads it must not expect one (argv.INCOMING).
"""

import asyncio
import errno
import json
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from alveole.host import pages, pidfd
from alveole.host.blocking import in_thread
from alveole.host.process import environment, run
from alveole.host.qmp import Monitor, connected
from alveole.model.error import AlveoleError, ErrorCode, conflict, exhausted, internal
from alveole.runtime.base import Handle
from alveole.runtime.oci import is_alive
from alveole.runtime.qemu.argv import MONITOR, PLACE, STATE

_PAGES_TIMEOUT_S = 300.0
_LOAD_TIMEOUT_S = 60.0
_POLL_S = 0.003
_END_S = 1.0
_SPARE_BYTES = 64 << 20  # left free, as a pool of volumes on that disk must not find none
_FREE = "free space on that disk and try again"
_STATE_LIMIT_BYTES = 8 << 20  # the file system that it is written to is no larger


async def nothing() -> None:
    """The default for what is done while a machine stands still."""


def monitor_socket(place: Path) -> Path:
    return place / MONITOR / "socket"


async def capture(
    handle: Handle,
    memory: Path,
    place: Path,
    target: Path,
    *,
    while_still: Callable[[], Awaitable[None]] = nothing,
    go_on: bool,
    slots: Path | None = None,
) -> dict[str, Any]:
    """Write ``pages`` and ``state`` into the directory ``target``; what became of them is told by the result.

    ``slots``: a file for the slots of the PCI bus where its devices are. ``while_still`` is awaited while the machine
    stands still. Whatever goes wrong, it goes on afterwards; if all goes well it does so only if asked to. Raises
    EXHAUSTED if the disk of ``target`` is full, CONFLICT if the machine ends.
    """
    saving = await _start_pages("save", handle.pid, memory, target / "pages")
    try:
        _require_space(target, (await _told(saving))["expected_bytes"])
        async with connected(monitor_socket(place), handle.id, alive=partial(is_alive, handle)) as monitor:
            if slots is not None:
                await _note_slots(monitor, slots)
            keep = None if go_on else partial(_keep, saving, target)
            told, state = await _stand_still(monitor, saving, place, while_still, keep)
        if go_on:
            await _keep(saving, target, state)
    except AlveoleError as error:
        if error.code is ErrorCode.INTERNAL and await _has_ended(handle):
            raise conflict("the machine ended while it was captured", hint="start it again first") from error
        raise
    finally:
        if saving.returncode is None:
            saving.kill()
            await saving.wait()
    return told


async def _note_slots(monitor: Monitor, file: Path) -> None:
    """Who goes on from what the machine is must have its devices where it has them. By their ids."""
    buses = await monitor.execute("query-pci")
    found = {device["qdev_id"]: device["slot"] for bus in buses for device in bus["devices"]}
    file.write_text(json.dumps(found))


async def _stand_still(
    monitor: Monitor,
    saving: asyncio.subprocess.Process,
    place: Path,
    while_still: Callable[[], Awaitable[None]],
    keep: Callable[[bytes], Awaitable[None]] | None,
) -> tuple[dict[str, Any], bytes]:
    """Read all that changes while a machine runs. With ``keep`` it does not go on, once that has succeeded."""
    began = asyncio.get_running_loop().time()
    try:
        await monitor.execute("stop")
        _tell(saving)
        told = await _told(saving)
        await monitor.execute("xen-save-devices-state", {"filename": f"{PLACE}/{STATE}", "live": False})
        state = await in_thread(lambda: read_state(place / STATE))  # before another capture of it can write there
        await while_still()
        await (keep(state) if keep else monitor.execute("cont"))
    except BaseException:
        with suppress(AlveoleError):  # that it cannot go on has a reason, which is being told
            await monitor.execute("cont")
        raise
    return {**told, "still_s": asyncio.get_running_loop().time() - began}, state


async def _keep(saving: asyncio.subprocess.Process, target: Path, state: bytes) -> None:
    """Write what was read."""
    try:
        await in_thread(lambda: _write(target / "state", state))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _full(target) from error
        raise
    _tell(saving)
    async with asyncio.timeout(_PAGES_TIMEOUT_S):
        if await saving.wait():
            raise await _failure(saving, target)


async def _has_ended(handle: Handle) -> bool:
    """What it was connected to notices its end a moment before the host does."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_S):
            await pidfd.wait_ended(handle.pid, handle.pid_started)
    return not is_alive(handle)


def _require_space(target: Path, size_bytes: int) -> None:
    """Before the machine stands still for nothing, and before others find no space on that disk."""
    disk = os.statvfs(target)
    if disk.f_bavail * disk.f_frsize < size_bytes + _SPARE_BYTES:
        raise _full(target, f" ({size_bytes >> 20} MiB)")


def _full(target: Path, size: str = "") -> AlveoleError:
    return exhausted(f"no space for the memory of a machine{size}: the disk of {target.parent} is full", hint=_FREE)


def read_state(source: Path) -> bytes:
    """What QEMU has written, who is hostile: a sparse file would take more of our memory than of its own."""
    with source.open("rb") as file:
        content = file.read(_STATE_LIMIT_BYTES + 1)
    if len(content) > _STATE_LIMIT_BYTES:
        raise internal(f"the state of a machine's devices is larger than {_STATE_LIMIT_BYTES >> 20} MiB")
    return content


def _write(target: Path, content: bytes) -> None:
    with target.open("wb") as copy:
        copy.write(content)
        copy.flush()
        os.fsync(copy.fileno())  # as the pages are, and QEMU's disks when it stops: a power cut may follow


async def _start_pages(*arguments: object) -> asyncio.subprocess.Process:
    argv = [sys.executable, "-ISs", pages.__file__, *map(str, arguments)]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=pipe, env=environment())


async def _told(saving: asyncio.subprocess.Process) -> dict[str, Any]:
    assert saving.stdout is not None  # noqa: S101  (a pipe)
    async with asyncio.timeout(_PAGES_TIMEOUT_S):
        line = await saving.stdout.readline()
    if not line:
        raise await _failure(saving)
    told: dict[str, Any] = json.loads(line)
    return told


def _tell(saving: asyncio.subprocess.Process) -> None:
    assert saving.stdin is not None  # noqa: S101  (a pipe)
    saving.stdin.write(b"\n")


async def _failure(saving: asyncio.subprocess.Process, target: Path | None = None) -> AlveoleError:
    words = (await saving.stderr.read()).decode(errors="replace") if saving.stderr else ""
    last = words.strip().rpartition("\n")[2]
    if target is not None and "No space left" in last:
        return _full(target)
    return internal(f"the memory of the machine could not be saved: {last or 'its reader ended'}")


async def load(handle: Handle, memory: Path, place: Path, state: Path, saved_pages: Path | None) -> None:
    """Make a machine that waits for it (``incoming``) what another was at a captured moment. It stands still then.

    Raises INTERNAL if it does not take that in, or ends meanwhile.
    """
    try:
        await _load(handle, memory, place, state, saved_pages)
    except AlveoleError as error:
        if error.code is ErrorCode.INTERNAL and await _has_ended(handle):
            raise internal("the machine ended before it had taken in what it was to go on from") from error
        raise


async def _load(handle: Handle, memory: Path, place: Path, state: Path, saved_pages: Path | None) -> None:
    await in_thread(lambda: _fill(state, place / STATE))
    async with connected(monitor_socket(place), handle.id, alive=partial(is_alive, handle)) as monitor:
        if saved_pages is not None:  # it has its memory: else it would not answer
            argv = [sys.executable, "-ISs", pages.__file__, "load", str(handle.pid), str(memory), str(saved_pages)]
            await run(argv, timeout_s=_PAGES_TIMEOUT_S)
        await monitor.execute("migrate-incoming", {"uri": f"file:{PLACE}/{STATE}"})
        try:
            async with asyncio.timeout(_LOAD_TIMEOUT_S):
                while not await _is_loaded(monitor):  # noqa: ASYNC110  (another process is waited for)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise internal(f"machine {handle.id} did not take in what was saved") from error


async def go_on(handle: Handle, place: Path) -> None:
    """Let a machine that stands still run. Nothing happens to one that runs."""
    async with connected(monitor_socket(place), handle.id, alive=partial(is_alive, handle)) as monitor:
        await monitor.execute("cont")


def _fill(source: Path, target: Path) -> None:
    """Overwrite a file of QEMU's, which stays its own."""
    descriptor = os.open(target, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(source.read_bytes())


async def _is_loaded(monitor: Monitor) -> bool:
    if (await monitor.execute("query-status"))["status"] == "paused":
        return True
    moved = await monitor.execute("query-migrate")
    if moved.get("status") == "failed":
        raise internal(
            f"what was saved of a machine cannot be loaded: {moved.get('error-desc', 'QEMU gives no reason')}"
        )
    return False
