"""How fast an instance may receive and send, measured in the laboratory: TCP over real devices."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alveole.network.base import Attachment
from alveole.network.routed import RoutedNetwork
from tests.integration.network_guest import guest
from tests.integration.network_lab import Lab, attach, driver, inside, laboratory, opened, sh

pytestmark = pytest.mark.root

RATE_BPS = 4_000_000
MEASURED_S = 1.5
Where = int | str | None


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path) as made:
        yield made


async def throughput_bps(sender: Where, receiver: Where, address: str) -> float:
    """Bytes a second that arrive, after the first burst."""
    loop = asyncio.get_running_loop()
    with opened(receiver, socket.SOCK_STREAM) as listener, opened(sender, socket.SOCK_STREAM) as client:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        await loop.sock_connect(client, (address, listener.getsockname()[1]))
        server, _ = await loop.sock_accept(listener)
        with server:
            sending = asyncio.create_task(_send_for_ever(client))
            try:
                await _received(server, 0.2)
                started = time.monotonic()
                return await _received(server, MEASURED_S) / (time.monotonic() - started)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)


async def _send_for_ever(client: socket.socket) -> None:
    while True:
        await asyncio.get_running_loop().sock_sendall(client, bytes(1 << 16))


async def _received(server: socket.socket, seconds: float) -> int:
    count = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                count += len(await asyncio.get_running_loop().sock_recv(server, 1 << 20))
    except TimeoutError:
        return count


async def is_limited(sender: Where, receiver: Where, address: str) -> bool:
    """Whether TCP uses most of RATE_BPS and no more. Raises AssertionError for anything between that and unlimited."""
    measured = await throughput_bps(sender, receiver, address)
    limited, unlimited = 0.5 * RATE_BPS < measured < 1.3 * RATE_BPS, measured > 5 * RATE_BPS
    assert limited != unlimited, f"{measured / RATE_BPS:.2f} of the rate"
    return limited


async def test_each_direction_has_its_own_limit(lab: Lab) -> None:
    async with driver(lab) as network:
        free = await attach(network, "free")
        slow_down = await attach(network, "down", host=3, receive_bps=RATE_BPS)
        slow_up = await attach(network, "up", host=4, send_bps=RATE_BPS)
        for instance, receives_limited, sends_limited in (
            (free, False, False),
            (slow_down, True, False),
            (slow_up, False, True),
        ):
            there = instance.network_namespace
            assert await is_limited(None, there, instance.address) == receives_limited
            assert await is_limited(there, lab.outside, "198.51.100.2") == sends_limited


async def test_a_machine_is_limited_too(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant", receive_bps=RATE_BPS, send_bps=RATE_BPS)
        async with guest(web) as vm:
            assert await is_limited(None, vm, web.address)
            assert await is_limited(vm, lab.outside, "198.51.100.2")


async def test_the_instance_cannot_lift_its_limits(lab: Lab) -> None:
    """Not even one that may configure its network: nothing of the limit is where it lives."""
    async with driver(lab) as network:
        web = await attach(network, "web", receive_bps=RATE_BPS, send_bps=RATE_BPS)
        with inside(web.network_namespace):
            assert "tbf" not in sh("tc", "qdisc", "show")
            sh("ip", "link", "set", "eth0", "down")
            sh("ip", "link", "set", "eth0", "up")
        again = await attach(network, "web", receive_bps=RATE_BPS, send_bps=RATE_BPS)
        assert again == web
        assert await is_limited(None, web.network_namespace, web.address)
        assert await is_limited(web.network_namespace, lab.outside, "198.51.100.2")


async def test_limits_outlive_the_daemon_and_end_with_the_instance(lab: Lab) -> None:
    before = lab.remains()
    first = RoutedNetwork(lab.identity(), pool_size=1)
    await first.open()
    await first.recover((), ())
    web = await attach(first, "web", receive_bps=RATE_BPS, send_bps=RATE_BPS)
    gone = await attach(first, "gone", host=3, send_bps=RATE_BPS)
    await first.close(keep=True)
    async with driver(lab, adopt=[Attachment.from_json(web.to_json())]):
        assert gone.interface not in sh("ip", "-o", "link")
        assert await is_limited(None, web.network_namespace, web.address)
        assert await is_limited(web.network_namespace, lab.outside, "198.51.100.2")
    assert lab.remains() == before


@pytest.mark.parametrize("rate_bps", [1, 1 << 33, 1 << 40])
async def test_extreme_rates_are_taken_as_they_are(lab: Lab, rate_bps: int) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", receive_bps=rate_bps, send_bps=rate_bps)
        for device in (web.interface, f"{web.interface}i"):
            found = json.loads(sh("tc", "-j", "qdisc", "show", "dev", device, "root"))
            assert found[0]["options"]["rate"] == rate_bps
