"""The guest of a machine, without the machine: a network stack of its own behind the tap that QEMU would open.

It is a namespace with a tap, whose frames are carried to and from the instance's tap. It sets up what its card says.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from alveole.host.tap import open_tap
from alveole.network.base import Attachment
from alveole.runtime.base import Card
from tests.integration.network_lab import fresh_namespace, inside, sh

_FRAME_BYTES = 65536


@contextmanager
def user(uid: int) -> Iterator[None]:
    """As this user of the host, without any privilege."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def open_card(attachment: Attachment, uid: int) -> int:
    """What QEMU does to get its network card. Raises PermissionError if the tap is not this user's."""
    assert attachment.card
    with inside(attachment.network_namespace), user(uid):
        return open_tap(attachment.card.device, headers=False)


@asynccontextmanager
async def guest(attachment: Attachment) -> AsyncIterator[int]:
    """A running guest, its network namespace open as the descriptor given."""
    assert attachment.card
    with fresh_namespace() as namespace:
        with inside(namespace):
            nic = open_tap("eth0", headers=False)
            _set_up(attachment.card)
        card = open_card(attachment, attachment.ids_base)
        loop = asyncio.get_running_loop()
        for source, target in ((nic, card), (card, nic)):
            os.set_blocking(source, False)
            loop.add_reader(source, _carry, source, target)
        try:
            await _carrier(attachment)
            yield namespace
        finally:
            for descriptor in (nic, card):
                loop.remove_reader(descriptor)
                os.close(descriptor)


async def _carrier(attachment: Attachment) -> None:
    """The kernel notices a moment later that somebody opened the tap; until then it drops what is sent there."""
    assert attachment.card
    async with asyncio.timeout(5):
        while True:
            with inside(attachment.network_namespace):
                if "state UP" in sh("ip", "link", "show", attachment.card.device):
                    return
            await asyncio.sleep(0.02)


def _carry(source: int, target: int) -> None:
    os.write(target, os.read(source, _FRAME_BYTES))


def _set_up(card: Card) -> None:
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "link", "set", "eth0", "address", card.mac, "up")
    pairs = [(card.control_address, card.control_gateway), (card.address, card.gateway)]
    for address, gateway in pairs[: 1 + card.has_route]:
        sh("ip", "address", "add", f"{address}/32", "dev", "eth0")
        sh("ip", "route", "add", gateway, "dev", "eth0", "src", address)
        sh("ip", "neighbour", "add", gateway, "lladdr", card.gateway_mac, "dev", "eth0", "nud", "permanent")
    if card.has_route:
        sh("ip", "route", "add", "default", "via", card.gateway, "dev", "eth0", "src", card.address)
