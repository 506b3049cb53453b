"""Machines in the routed network: a constant inside, an outside of their own. A guest stands in for each machine."""

import asyncio
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import dns.message
import pytest

from alveole.host import sysctl
from alveole.model.error import AlveoleError
from alveole.model.instance import Port
from alveole.network.base import (
    CONTROL_ADDRESS,
    CONTROL_GATEWAY,
    GUEST_ADDRESS,
    GUEST_GATEWAY,
    GUEST_GATEWAY_MAC,
    GUEST_MAC,
    Attachment,
)
from alveole.network.routed import RoutedNetwork
from alveole.network.slots import INNER_MAC
from alveole.runtime.base import Ids
from tests.integration.network_guest import guest, open_card
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
    opened,
    reach,
    serving,
    sh,
)

METADATA = "169.254.169.254"
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_MTU = 10, 2, 14

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
                        return bool(source == address)
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
        with inside(web.network_namespace):
            assert sysctl.read("net/netfilter/nf_conntrack_count") == "0"
            assert {link["mtu"] for link in json.loads(sh("ip", "-j", "link")) if link["ifname"] != "lo"} == {1500}


async def test_machines_with_one_inside_address_do_not_mix(lab: Lab) -> None:
    async with driver(lab) as network:
        here = await attach(network, "here", machine="constant")
        near = await attach(network, "near", host=3, machine="constant")
        assert here.card == near.card
        async with guest(here) as a, guest(near) as b, serving(a, 80, "here"), serving(b, 80, "near"):
            assert await reach(a, near.address, 80) == f"near {here.address}"
            assert await reach(b, here.address, 80) == f"here {near.address}"
            assert await reach(a, here.address, 80) == f"here {GUEST_GATEWAY}"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_published_port_leads_to_the_guest(lab: Lab, protocol: str) -> None:
    port = Port(host_port=8080, instance_port=80, protocol=protocol)
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant", ports=(port,))
        async with guest(web) as vm, serving(vm, 80, "web"):
            assert await reach(lab.outside, HOST_ADDRESS, 8080, protocol=protocol) == f"web {OUTSIDE_ADDRESS}"
            assert await reach(None, "127.0.0.1", 8080, protocol=protocol) == f"web {GUEST_GATEWAY}"


async def test_a_guest_asks_its_gateway_for_names(lab: Lab) -> None:
    """A constant address too: the node's own differs between nodes."""
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant")
        await attach(network, "mate", host=3)
        assert network.resolv_conf(web) == f"nameserver {GUEST_GATEWAY}\noptions ndots:0\n"
        query = dns.message.make_query("mate", "A")
        async with guest(web) as vm, asyncio.timeout(2):
            with opened(vm, socket.SOCK_DGRAM) as client:
                client.connect((GUEST_GATEWAY, 53))
                client.send(query.to_wire())
                answer = dns.message.from_wire(await asyncio.get_running_loop().sock_recv(client, 512))
        assert "10.80.16.3" in answer.answer[0].to_text()


async def test_nothing_leaves_but_what_the_guest_sends_as_itself(lab: Lab) -> None:
    """Seen on the host's end of the device, before any rule of the host. The last packet is an honest one."""
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant")
        mate = await attach(network, "mate", host=3)
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
        wire.setblocking(False)
        wire.bind((web.interface, 0x0003))
        async with guest(web) as vm:
            with inside(vm):
                for address in (web.address, mate.address, CONTROL_GATEWAY, "198.51.100.7"):
                    sh("ip", "address", "add", f"{address}/32", "dev", "eth0")
            for source in (web.address, mate.address, CONTROL_ADDRESS, CONTROL_GATEWAY, "198.51.100.7"):
                throw(vm, source, OUTSIDE_ADDRESS)
            for target in (METADATA, "169.254.0.9", "192.0.0.3", "255.255.255.255"):
                throw(vm, GUEST_ADDRESS, target)
                throw(vm, CONTROL_ADDRESS, target)
            _take_mac(vm, "02:00:00:00:00:09")
            throw(vm, GUEST_ADDRESS, OUTSIDE_ADDRESS)
            _take_mac(vm, GUEST_MAC)
            throw(vm, GUEST_ADDRESS, "198.51.100.9")
            async with asyncio.timeout(2):
                seen = await asyncio.get_running_loop().sock_recv(wire, 200)
        wire.close()
        assert (socket.inet_ntoa(seen[12:16]), socket.inet_ntoa(seen[16:20])) == (web.address, "198.51.100.9")


def _take_mac(where: int, mac: str) -> None:
    """Whoever changes it forgets all neighbours."""
    with inside(where):
        sh("ip", "link", "set", "eth0", "address", mac)
        sh("ip", "neighbour", "replace", GUEST_GATEWAY, "dev", "eth0", "lladdr", GUEST_GATEWAY_MAC)


def throw(where: int, source: str, target: str) -> None:
    """A datagram that nobody answers."""
    with opened(where, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sender.bind((source, 0))
        sender.sendto(b"?", (target, 9))


async def test_the_control_address_is_for_the_namespace_alone(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant")
        near = await attach(network, "near", host=3, machine="constant")
        mate = await attach(network, "mate", host=4)
        sh("ip", "route", "add", f"{CONTROL_ADDRESS}/32", "dev", web.interface)
        sh("ip", "neighbour", "add", CONTROL_ADDRESS, "dev", web.interface, "lladdr", INNER_MAC)
        async with guest(web) as vm, guest(near) as other, serving(vm, 22, "web"):
            assert await reach(web.network_namespace, CONTROL_ADDRESS, 22) == f"web {CONTROL_GATEWAY}"
            assert await reach(near.network_namespace, CONTROL_ADDRESS, 22) == DENIED
            for asker in (None, mate.network_namespace, other):
                assert await reach(asker, web.address, 22) != DENIED
                assert await reach(asker, CONTROL_ADDRESS, 22) == DENIED


async def test_a_guest_reaches_nothing_in_its_namespace(lab: Lab) -> None:
    """That is where the machine's own process lives."""
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant")
        async with guest(web) as vm, serving(web.network_namespace, 9000, "namespace"):
            assert await reach(web.network_namespace, CONTROL_GATEWAY, 9000) == f"namespace {CONTROL_GATEWAY}"
            assert not await ping(vm, CONTROL_GATEWAY)
            for protocol in ("tcp", "udp"):
                assert await reach(vm, CONTROL_GATEWAY, 9000, protocol=protocol) == DENIED
                with opened(vm, KINDS[protocol]) as sly:
                    sly.bind((CONTROL_ADDRESS, 22))
                    assert not await answered(sly, CONTROL_GATEWAY, 9000)


async def answered(client: socket.socket, address: str, port: int) -> bool:
    """Whether anything comes back, were it a refusal."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(0.3):
            await loop.sock_connect(client, (address, port))
            await loop.sock_sendall(client, b"?")
            await loop.sock_recv(client, 1)
    except OSError as error:
        return not isinstance(error, TimeoutError)
    return True


async def test_a_guest_that_asks_finds_its_gateway_and_teaches_no_neighbours(lab: Lab) -> None:
    """Guests that cannot be told neighbour entries ask for them. The table they could fill is the whole host's."""
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant")
        assert web.card
        async with guest(web) as vm, serving(lab.outside, 80, "outside"):
            with inside(vm):
                sh("ip", "neighbour", "del", GUEST_GATEWAY, "dev", "eth0")
            assert await reach(vm, OUTSIDE_ADDRESS, 80) == f"outside {HOST_ADDRESS}"
            with inside(vm):
                assert web.card.gateway_mac in sh("ip", "neighbour", "show", GUEST_GATEWAY)
                sh("ip", "address", "add", "192.0.0.5/32", "dev", "eth0")
                sh("ip", "neighbour", "del", GUEST_GATEWAY, "dev", "eth0")
            throw(vm, "192.0.0.5", GUEST_GATEWAY)
            with inside(vm):
                sh("ip", "neighbour", "replace", GUEST_GATEWAY, "dev", "eth0", "lladdr", web.card.gateway_mac)
            assert await reach(vm, OUTSIDE_ADDRESS, 80) == f"outside {HOST_ADDRESS}"
            with inside(web.network_namespace):
                known = json.loads(sh("ip", "-j", "-4", "neighbour", "show", "dev", "tap0"))
            assert {(entry["dst"], *entry["state"]) for entry in known} == {
                (CONTROL_ADDRESS, "PERMANENT"),
                (GUEST_ADDRESS, "PERMANENT"),
            }


async def test_a_machine_may_see_its_own_address(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", machine="same")
        assert web.card
        gateway = network._identity.gateway
        assert (web.card.address, web.card.gateway) == (web.address, gateway)
        assert network.resolv_conf(web).startswith(f"nameserver {gateway}\n")
        async with guest(web) as vm, serving(vm, 80, "web", web.address), serving(lab.outside, 80, "outside"):
            assert await reach(None, web.address, 80) == f"web {gateway}"
            assert await reach(vm, OUTSIDE_ADDRESS, 80) == f"outside {HOST_ADDRESS}"
            assert await reach(lab.outside, web.address, 80) == DENIED
            assert await refused(vm, OUTSIDE_ADDRESS, 9)


@pytest.mark.parametrize("machine", ["constant", "same"])
async def test_a_machine_without_network_has_its_control_address_only(lab: Lab, machine: str) -> None:
    async with driver(lab) as network:
        shut = await attach(network, "shut", mode="none", machine=machine)
        assert shut.card
        assert (shut.card.address, shut.card.has_route, shut.interface) == (GUEST_ADDRESS, False, "")
        async with guest(shut) as vm, serving(vm, 22, "shut"):
            assert await reach(shut.network_namespace, CONTROL_ADDRESS, 22) == f"shut {CONTROL_GATEWAY}"
            with inside(vm):
                sh("ip", "route", "add", "default", "via", CONTROL_GATEWAY)
            assert await reach(vm, OUTSIDE_ADDRESS, 80) == DENIED
        assert await attach(network, "shut", mode="none", machine=machine) == shut


async def test_the_tap_is_its_machines_alone(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant")
        for stranger in (web.ids_base + 1, web.ids_base - 1, 65534):
            with pytest.raises(PermissionError):
                open_card(web, stranger)
        os.close(open_card(web, web.ids_base))


async def test_a_running_machine_is_adopted_attached_again_and_removed(lab: Lab) -> None:
    before = lab.remains()
    first = RoutedNetwork(lab.identity(), pool_size=1)
    await first.open()
    await first.recover((), ())
    web = await attach(first, "web", machine="constant", ports=(Port(host_port=8080, instance_port=80),))
    async with guest(web) as vm, serving(vm, 80, "web"):
        await first.close(keep=True)
        assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"web {OUTSIDE_ADDRESS}"
        async with driver(lab, adopt=[Attachment.from_json(web.to_json())]) as second:
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"web {OUTSIDE_ADDRESS}"
            assert await attach(second, "web", machine="constant", ports=web.ports) == web
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"web {OUTSIDE_ADDRESS}"
            await second.detach(web, keep_ids=False)
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == DENIED
    assert lab.remains() == before


async def test_a_machine_that_became_none_is_attached_anew(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant")
        again = await attach(network, "web", ids=Ids(base=web.ids_base))
        assert (web.card is None, again.card, again.ids_base) == (False, None, web.ids_base)


async def test_a_machine_shares_no_namespace_with_the_host(lab: Lab) -> None:
    async with driver(lab) as network:
        for options in ({"mode": "host"}, {"shifted": False}):
            with pytest.raises(AlveoleError, match="no namespaces of its own"):
                await attach(network, "web", machine="constant", **options)


async def test_icmp_errors_reach_the_socket_they_are_about(lab: Lab) -> None:
    """Both ways: without it a refused datagram is waited for, and a path with small packets swallows large ones."""
    async with driver(lab) as network:
        web = await attach(network, "web", machine="constant")
        async with guest(web) as vm:
            assert await refused(None, web.address, 9)
            assert await refused(vm, OUTSIDE_ADDRESS, 9)
            await network._dns.close()
            assert await refused(vm, GUEST_GATEWAY, 53)
            sh("ip", "link", "set", "up0", "mtu", "1280")
            with opened(vm, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
                sender.connect((OUTSIDE_ADDRESS, 9))
                assert sender.send(bytes(1400)) == 1400
                with pytest.raises(OSError, match="too long"):
                    await asyncio.get_running_loop().sock_recv(sender, 1)
                assert sender.getsockopt(socket.IPPROTO_IP, IP_MTU) == 1280


async def refused(where: int | None, address: str, port: int) -> bool:
    """Whether "nobody listens at that port" comes back for a datagram. Nobody does."""
    with opened(where, socket.SOCK_DGRAM) as sender:
        sender.connect((address, port))
        sender.send(b"?")
        try:
            async with asyncio.timeout(0.5):
                await asyncio.get_running_loop().sock_recv(sender, 1)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    raise AssertionError("somebody listens")
