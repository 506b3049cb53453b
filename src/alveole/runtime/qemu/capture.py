"""What a machine is at one moment, taken while it stands still; and another machine going on from there.

Two files: the private pages of its memory, at their offsets in a sparse file, and the state of its devices. Whoever
goes on maps the same file as memory that the first had mapped, and has the same shape.

xen-save-devices-state is the one command of QEMU's that saves devices without memory when memory is a private mapping;
what it writes has no configuration section, so whoever loads it must not expect one (argv.INCOMING).
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from alveole.host import pages
from alveole.host.blocking import in_thread
from alveole.host.process import environment, run
from alveole.host.qmp import Monitor, connected
from alveole.model.error import AlveoleError, ErrorCode, internal
from alveole.runtime.qemu.argv import MONITOR, PLACE, STATE

_PAGES_TIMEOUT_S = 300.0
_LOAD_TIMEOUT_S = 60.0
_POLL_S = 0.003
_STATE_LIMIT_BYTES = 8 << 20  # the file system that it is written to is no larger


async def nothing() -> None:
    """The default for what is done while a machine stands still."""


def monitor_socket(place: Path) -> Path:
    return place / MONITOR / "socket"


async def capture(
    pid: int,
    memory: Path,
    place: Path,
    target: Path,
    *,
    name: str,
    while_still: Callable[[], Awaitable[None]] = nothing,
    go_on: bool,
) -> dict[str, Any]:
    """Write ``pages`` and ``state`` into the directory ``target``; what became of them is told by the result.

    ``while_still`` is awaited while the machine stands still. Whatever goes wrong, it goes on afterwards; if all goes
    well it does so only if asked to.
    """
    saving = await _start_pages("save", pid, memory, target / "pages")
    try:
        async with connected(monitor_socket(place), name) as monitor:
            loop = asyncio.get_running_loop()
            began = loop.time()
            await monitor.execute("stop")
            try:
                told = await _ask(saving)
                await monitor.execute("xen-save-devices-state", {"filename": f"{PLACE}/{STATE}", "live": False})
                await while_still()
            except BaseException:
                await monitor.execute("cont")
                raise
            if go_on:
                await monitor.execute("cont")
            still_s = loop.time() - began
        await in_thread(lambda: take(place / STATE, target / "state"))
        await _finish(saving)
    finally:
        if saving.returncode is None:
            saving.kill()
            await saving.wait()
    return {**told, "still_s": still_s}


def take(source: Path, target: Path) -> None:
    """Copy what QEMU has written, who is hostile: a sparse file would take more of our disk than of its memory."""
    with source.open("rb") as file, target.open("wb") as copy:
        content = file.read(_STATE_LIMIT_BYTES + 1)
        if len(content) > _STATE_LIMIT_BYTES:
            raise internal(f"the state of a machine's devices is larger than {_STATE_LIMIT_BYTES >> 20} MiB")
        copy.write(content)
        copy.flush()
        os.fsync(copy.fileno())  # as the pages are, and QEMU's disks when it stops: a power cut may follow


async def _start_pages(*arguments: object) -> asyncio.subprocess.Process:
    argv = [sys.executable, "-ISs", pages.__file__, *map(str, arguments)]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=pipe, env=environment())


async def _ask(saving: asyncio.subprocess.Process) -> dict[str, Any]:
    assert saving.stdin is not None and saving.stdout is not None  # noqa: S101, PT018  (both are pipes)
    saving.stdin.write(b"\n")
    async with asyncio.timeout(_PAGES_TIMEOUT_S):
        line = await saving.stdout.readline()
    if not line:
        raise await _failure(saving)
    told: dict[str, Any] = json.loads(line)
    return told


async def _finish(saving: asyncio.subprocess.Process) -> None:
    assert saving.stdin is not None  # noqa: S101  (a pipe)
    saving.stdin.write(b"\n")
    async with asyncio.timeout(_PAGES_TIMEOUT_S):
        if await saving.wait():
            raise await _failure(saving)


async def _failure(saving: asyncio.subprocess.Process) -> AlveoleError:
    words = (await saving.stderr.read()).decode(errors="replace") if saving.stderr else ""
    last = words.strip().rpartition("\n")[2]
    if "No space left" in last:
        return AlveoleError(ErrorCode.EXHAUSTED, "no space for the memory of the machine", hint="free some disk space")
    return internal(f"the memory of the machine could not be saved: {last or 'its reader ended'}")


async def load(pid: int, memory: Path, place: Path, state: Path, saved_pages: Path | None, *, name: str) -> None:
    """Make a machine that waits for it (``incoming``) what another was at a captured moment. It stands still then."""
    await in_thread(lambda: _fill(state, place / STATE))
    async with connected(monitor_socket(place), name) as monitor:  # it answers once it has its memory
        if saved_pages is not None:
            argv = [sys.executable, "-ISs", pages.__file__, "load", str(pid), str(memory), str(saved_pages)]
            await run(argv, timeout_s=_PAGES_TIMEOUT_S)
        await monitor.execute("migrate-incoming", {"uri": f"file:{PLACE}/{STATE}"})
        try:
            async with asyncio.timeout(_LOAD_TIMEOUT_S):
                while not await _is_loaded(monitor):  # noqa: ASYNC110  (another process is waited for)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise internal(f"machine {name} did not take in what was saved") from error


async def go_on(place: Path, *, name: str) -> None:
    """Let a machine that stands still run. Nothing happens to one that runs."""
    async with connected(monitor_socket(place), name) as monitor:
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
