"""Slots: an id range with the namespaces and the device made for it, ahead of time where possible.

Slot N is ids ``uid_base + N * 65536`` and up, the pins in ``run/ns/N``, and the host's device named after N. An
instance keeps its slot, so that nothing on the host is ever found under two names.
"""

import asyncio
import errno
import logging
import re
import socket
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alveole.host import sysctl
from alveole.host.blocking import in_thread
from alveole.host.identity import UID_WINDOW_SIZE, Identity
from alveole.host.mount import ensure_private, unmount
from alveole.host.netlink import Netlink, delete_link, link_up, new_veth
from alveole.host.netns import (
    IDS_PER_RANGE,
    NETWORK_PIN,
    USER_PIN,
    NamespaceMaker,
    netlink_inside,
    remove_pins,
)
from alveole.model.error import AlveoleError, exhausted, internal
from alveole.network.limits import DETOUR, detour_of

log = logging.getLogger(__name__)

SLOTS = UID_WINDOW_SIZE // IDS_PER_RANGE - 1  # the last range belongs to image builds
INNER_DEVICE = "eth0"
HOST_MAC, INNER_MAC = (
    "02:00:00:00:00:01",
    "02:00:00:00:00:02",
)  # each pair is a link of its own: no address is seen twice
_RETRY_S = 5.0
_PAUSE_S = 0.05  # the instance that took a slot starts meanwhile: it has the processors first


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """What a slot shall have."""

    user: bool  # a user namespace
    network: bool  # a network namespace, its loopback up
    device: bool  # a pair of devices, up: one on the host, one inside


def slot_of(pin: Path) -> int:
    """The slot of a pinned namespace."""
    return int(pin.parent.name)


POOLED = Make(user=True, network=True, device=True)


class Slots:
    """All slots of one daemon, and a pool of those made ahead."""

    def __init__(self, identity: Identity, *, pool_size: int) -> None:
        self._identity = identity
        self._pool_size = pool_size
        self._pins = identity.run / "ns"
        self._maker = NamespaceMaker()
        self._used: dict[int, str] = {}  # slot: the instance that has it; empty while in the pool
        self._reserved: set[int] = set()
        self._ready: deque[int] = deque()
        self._wanted = asyncio.Event()
        self._filler: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._pins.mkdir(mode=0o700, exist_ok=True)
        await ensure_private(self._pins)

    def start_filling(self) -> None:
        """Begin to make slots ahead, in the background."""
        if self._filler is None and self._pool_size:
            self._wanted.set()
            self._filler = asyncio.create_task(self._fill(), name="network pool")

    async def drain(self) -> None:
        """Stop making slots ahead and remove those that nobody took."""
        filler, self._filler = self._filler, None
        if filler:
            filler.cancel()
            await asyncio.gather(filler, return_exceptions=True)
        while self._ready:
            await self.free(self._ready.popleft())

    async def close(self) -> None:
        await self.drain()
        await self._maker.close()

    async def take(self, instance_id: str, make: Make, ids_base: int | None) -> int:
        """A slot for an instance: the one of its range if it has one, else from the pool, else a new one.

        Raises AlveoleError(EXHAUSTED) if no range is left.
        """
        if ids_base is None and make == POOLED and self._ready:
            number = self._ready.popleft()
            self._used[number] = instance_id
            self._wanted.set()
            return number
        number = self._free_number() if ids_base is None else self.number_of(ids_base)
        if ids_base is not None and number in self._ready:
            self._ready.remove(number)
            await self.free(number)
        if self._used.get(number, instance_id) != instance_id:
            raise internal(
                f"id range {ids_base} of instance {instance_id} is used by {self._used[number] or 'the pool'}"
            )
        await self._make(number, instance_id, make)
        return number

    async def free(self, number: int, *, keep_ids: bool = False) -> None:
        """Remove a slot's namespaces and device. ``keep_ids``: its range is given to nobody else."""
        try:
            await in_thread(partial(self._remove, number))
        finally:
            self._used.pop(number, None)
            (self._reserved.add if keep_ids else self._reserved.discard)(number)

    def release_ids(self, ids_base: int) -> None:
        """Give up a range that was kept for an instance."""
        self._reserved.discard(self.number_of(ids_base))

    async def adopt(self, used: dict[int, str], reserved: Collection[int]) -> None:
        """After a restart: these slots are in use, these ranges reserved; all other slots are removed."""
        await self.drain()
        self._used = dict(used)
        self._reserved = set(reserved)
        for number in await in_thread(self._present):
            if number not in self._used:
                await in_thread(partial(self._remove, number))

    async def remove_all(self) -> None:
        """Remove every slot found, whoever has it, and the directory of pins."""
        await self.adopt({}, ())
        await unmount(self._pins)
        if self._pins.exists():
            self._pins.rmdir()

    def device(self, number: int) -> str:
        """The host's end of the slot's pair of devices."""
        return f"{self._identity.interface_prefix}{number:x}"

    def directory(self, number: int) -> Path:
        return self._pins / str(number)

    def user_pin(self, number: int) -> Path:
        return self.directory(number) / USER_PIN

    def network_pin(self, number: int) -> Path:
        return self.directory(number) / NETWORK_PIN

    def ids_base(self, number: int) -> int:
        return self._identity.uid_base + number * IDS_PER_RANGE

    def number_of(self, ids_base: int) -> int:
        """Raises AlveoleError(INTERNAL) if the range is none of this daemon's."""
        number, rest = divmod(ids_base - self._identity.uid_base, IDS_PER_RANGE)
        if rest or not 0 <= number < SLOTS:
            raise internal(f"id range {ids_base} is none of this daemon's", hint="was the state directory copied?")
        return number

    def _free_number(self) -> int:
        number = next((n for n in range(SLOTS) if n not in self._used and n not in self._reserved), None)
        if number is None:
            raise exhausted(f"all {SLOTS} id ranges of this node are in use", hint="remove instances no longer needed")
        return number

    async def _fill(self) -> None:
        while True:
            await self._wanted.wait()
            await asyncio.sleep(_PAUSE_S)
            self._wanted.clear()
            try:
                while len(self._ready) < self._pool_size:
                    number = self._free_number()
                    await self._make(number, "", POOLED)
                    self._ready.append(number)
            except (AlveoleError, OSError) as error:
                log.warning("no network slot could be made ahead, next try in %g s: %s", _RETRY_S, error)
                await asyncio.sleep(_RETRY_S)
                self._wanted.set()

    async def _make(self, number: int, instance_id: str, make: Make) -> None:
        self._used[number] = instance_id
        try:
            if make.user or make.network:
                base = self.ids_base(number) if make.user else None
                await self._maker.make(self.directory(number), ids_base=base, network=make.network)
            if make.network:
                await in_thread(partial(self._wire, number, device=make.device))
        except BaseException:
            await self.free(number, keep_ids=number in self._reserved)
            raise

    def _wire(self, number: int, *, device: bool) -> None:
        """Bring the loopback up and connect the namespace to the host."""
        pin = self.network_pin(number)
        names = ("lo", INNER_DEVICE) if device else ("lo",)
        if device:
            name = self.device(number)
            with Netlink() as host, pin.open("rb") as namespace:
                host.send([delete_link(name)], ignore=[errno.ENODEV])
                host.send([new_veth(name, HOST_MAC, INNER_DEVICE, INNER_MAC, namespace.fileno())])
                sysctl.write(f"net/ipv4/conf/{name}/route_localnet", "1")  # for ports published on 127.0.0.1
                sysctl.write_if_present(f"net/ipv6/conf/{name}/disable_ipv6", "1")
                host.send([link_up(name, arp=False)])
        with netlink_inside(pin) as inside:
            inside.send([link_up(device) for device in names])

    def _remove(self, number: int) -> None:
        device = self.device(number)
        with Netlink() as host:
            host.send([delete_link(device), delete_link(detour_of(device))], ignore=[errno.ENODEV])
        remove_pins(self.directory(number))

    def _present(self) -> set[int]:
        """Slots of which anything is found on this host."""
        prefix = self._identity.interface_prefix
        present = {name for _, name in socket.if_nameindex() if name.startswith(prefix)}
        devices = [name.removeprefix(prefix).removesuffix(DETOUR) for name in present]
        numbers = {int(rest, 16) for rest in devices if re.fullmatch("[0-9a-f]{1,3}", rest)}
        return numbers | {int(path.name) for path in self._pins.glob("[0-9]*")}
