"""Machines in the routed network: a constant inside, an outside of their own. A guest stands in for each machine."""

import asyncio
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from alveole.network.base import GUEST_ADDRESS, GUEST_GATEWAY
from tests.integration.network_guest import guest
from tests.integration.network_lab import (
    DENIED,
    HOST_ADDRESS,
    OUTSIDE_ADDRESS,
    Lab,
    attach,
    driver,
    inside,
    laboratory,
    make_network,
    reach,
    serving,
)

pytestmark = pytest.mark.root


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path) as made:
        yield made


async def ping(where: int | str | None, address: str) -> bool:
    echo = struct.pack(">BBHHH", 8, 0, 0xF7FF - 0x0700, 0, 0x0700)  # its checksum by hand: all words add up to 0xFFFF
    with inside(where):
        asker = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    asker.setblocking(False)
    with asker:
        asker.sendto(echo, (address, 0))
        try:
            async with asyncio.timeout(0.5):
                while True:
                    packet, (source, _) = await asyncio.get_running_loop().sock_recvfrom(asker, 200)
                    if packet[20] == 0:  # an echo reply
                        return source == address
        except TimeoutError:
            return False


async def test_a_machine_is_reached_at_its_address_and_knows_it_by_a_constant_one(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant")
        mate = await attach(network, "mate", host=3)
        far = await attach(network, "far", network=make_network(2))
        assert web.card
        assert web.card.address == GUEST_ADDRESS
        async with guest(web) as vm, serving(vm, 80, "web", GUEST_ADDRESS), serving(lab.outside, 80, "outside"):
            assert await ping(None, web.address)
            for protocol in ("tcp", "udp"):
                assert await reach(None, web.address, 80, protocol=protocol) == f"web {GUEST_GATEWAY}"
                answer = await reach(mate.network_namespace, web.address, 80, protocol=protocol)
                assert answer == f"web {mate.address}"
                assert await reach(far.network_namespace, web.address, 80, protocol=protocol) == DENIED
                assert await reach(vm, OUTSIDE_ADDRESS, 80, protocol=protocol) == f"outside {HOST_ADDRESS}"
