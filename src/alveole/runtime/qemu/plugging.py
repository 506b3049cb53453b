"""Disks that come to a running machine and leave it.

QEMU cannot open them in its jail: it is handed a descriptor. The guest mounts them where the instance sees them.
"""

import asyncio
import base64
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alveole.host.qmp import Monitor, connected
from alveole.model.error import AlveoleError, ErrorCode, conflict
from alveole.runtime.base import CellMount
from alveole.runtime.qemu.argv import Part, device_id, plug
from alveole.runtime.qemu.capture import monitor_socket
from alveole.runtime.qemu.guest import Guest

log = logging.getLogger(__name__)
_TIMEOUT_S = 20.0
_FLUSH_TIMEOUT_S = 5.0
_POLL_S = 0.01


async def plug_disk(place: Path, guest: Guest, name: str, mount: CellMount, *, alive: Callable[[], bool]) -> None:
    """Raises CONFLICT saying why the guest does not mount it; then it is not plugged in."""
    assert mount.source is not None  # noqa: S101  (a disk)
    descriptor = os.open(mount.source, (os.O_RDONLY if mount.read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        async with connected(monitor_socket(place), name) as monitor:
            monitor.send_descriptor(descriptor)
            handed = await monitor.execute("add-fd")
            part = Part(name=name, read_only=mount.read_only, is_disk=True)
            for command, arguments in plug(part, file=f"/dev/fdset/{handed['fdset-id']}"):
                await monitor.execute(command, arguments)
    finally:
        os.close(descriptor)
    access = "ro" if mount.read_only else "rw"
    target = base64.b64encode(mount.target.encode()).decode()  # it may hold spaces, and lines of its own
    refusal = await _ask(guest, "mount", f"{name} {access} {target}", alive=alive)
    if refusal:
        await _take_out(place, name)
        raise conflict(f"the machine cannot mount it at {mount.target}: {refusal}")


async def plug_parts(place: Path, name: str, parts: Sequence[Part], slots: Mapping[str, int]) -> None:
    """Plug in what a machine has from the beginning, at these slots of its PCI bus if they are told, by name."""
    if not parts:
        return
    async with connected(monitor_socket(place), name) as monitor:
        for part in parts:
            for command, arguments in plug(part, slot=slots.get(part.name)):
                await monitor.execute(command, arguments)


def slots_of(file: Path, parts: Sequence[Part]) -> dict[str, int]:
    """The slots of these parts, by name, as ``capture`` wrote them."""
    found = json.loads(file.read_text())
    return {part.name: found[device_id(part.name)] for part in parts if device_id(part.name) in found}


async def unplug_disk(place: Path, guest: Guest, name: str, *, alive: Callable[[], bool]) -> None:
    """Raises CONFLICT if the instance uses it; then it stays."""
    refusal = await _ask(guest, "unmount", name, alive=alive)
    if refusal:
        raise conflict(f"the instance uses files of the volume: {refusal}", hint="end what uses it, then detach it")
    await _take_out(place, name)


async def flush_files(guest: Guest, name: str, *, alive: Callable[[], bool]) -> None:
    """What was written to files reaches the disks. A guest that does not answer is not waited for long."""
    try:
        await _ask(guest, "flush", "", alive=alive, timeout_s=_FLUSH_TIMEOUT_S)
    except AlveoleError as error:
        log.warning("what machine %s wrote last may not be on its disks: %s", name, error)


async def _ask(guest: Guest, verb: str, what: str, *, alive: Callable[[], bool], timeout_s: float = _TIMEOUT_S) -> str:
    """Why the guest refused; empty if it did it."""
    token = secrets.token_hex(4)
    await guest.send(f"{verb} {token} {what}".rstrip())
    told = await guest.until(lambda told: told.answer(token) is not None, alive=alive, timeout_s=timeout_s)
    return told.answer(token) or ""


async def _take_out(place: Path, name: str) -> None:
    async with connected(monitor_socket(place), name) as monitor:
        await monitor.execute("device_del", {"id": device_id(name)})
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                while not await _is_free(monitor, name):  # noqa: ASYNC110  (the guest lets go of it)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise AlveoleError(ErrorCode.TIMEOUT, "the guest of the machine does not let go of the disk") from error


async def _is_free(monitor: Monitor, name: str) -> bool:
    """Whether its device was gone, and it is too now."""
    try:
        await monitor.execute("blockdev-del", {"node-name": name})
    except AlveoleError as error:
        if "in use" in error.message:
            return False
        raise
    return True
