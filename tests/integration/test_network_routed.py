"""Who reaches whom in the routed network: real namespaces, real rules, a real outside."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Port
from alveole.runtime.base import Ids
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
    neighbour,
    opened,
    reach,
    serving,
    sh,
)

pytestmark = pytest.mark.root


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path) as made:
        yield made


async def test_only_instances_of_one_network_reach_each_other(lab: Lab) -> None:
    async with driver(lab) as network:
        here = await attach(network, "here")
        near = await attach(network, "near", host=3)
        far = await attach(network, "far", network=make_network(2))
        async with serving(near.network_namespace, 80, "near"), serving(far.network_namespace, 80, "far"):
            for protocol in ("tcp", "udp"):
                assert (
                    await reach(here.network_namespace, near.address, 80, protocol=protocol) == f"near {here.address}"
                )
                assert await reach(here.network_namespace, far.address, 80, protocol=protocol) == DENIED
            assert await reach(lab.outside, near.address, 80) == DENIED
            assert await reach(None, far.address, 80) == f"far {network._identity.gateway}"  # the host itself may


async def test_a_direct_route_from_outside_does_not_help(lab: Lab) -> None:
    async with driver(lab) as network:
        here = await attach(network, "here")
        with inside(lab.outside):
            sh("ip", "route", "add", "10.80.0.0/16", "via", HOST_ADDRESS)
        async with serving(here.network_namespace, 80, "here"):
            assert await reach(lab.outside, here.address, 80) == DENIED


async def test_the_host_and_its_services_are_closed_to_instances(lab: Lab) -> None:
    async with driver(lab) as network:
        here = await attach(network, "here")
        gateway = network._identity.gateway
        async with serving(None, 9000, "host"):
            assert await reach(None, HOST_ADDRESS, 9000) == f"host {HOST_ADDRESS}"
            for address in (gateway, HOST_ADDRESS):
                for protocol in ("tcp", "udp"):
                    assert await reach(here.network_namespace, address, 9000, protocol=protocol) == DENIED


async def test_packets_with_the_source_of_another_are_dropped(lab: Lab) -> None:
    """Datagrams one way: an answer would go to the true owner anyway."""
    async with driver(lab) as network:
        here = await attach(network, "here")
        near = await attach(network, "near", host=3)
        mate = await attach(network, "mate", host=4)
        with inside(here.network_namespace):
            sh("ip", "address", "add", f"{mate.address}/32", "dev", "eth0")
        loop = asyncio.get_running_loop()
        with opened(near.network_namespace, socket.SOCK_DGRAM) as receiver:
            receiver.bind(("0.0.0.0", 80))
            for source in (mate.address, here.address):
                with opened(here.network_namespace, socket.SOCK_DGRAM) as sender:
                    sender.bind((source, 0))
                    sender.sendto(b"?", (near.address, 80))
            async with asyncio.timeout(2):
                assert (await loop.sock_recvfrom(receiver, 1))[1][0] == here.address
            with pytest.raises(BlockingIOError):
                receiver.recv(1)


async def test_the_way_out_is_masqueraded_and_internal_networks_have_none(lab: Lab) -> None:
    async with driver(lab) as network:
        here = await attach(network, "here")
        shut = await attach(network, "shut", network=make_network(2, internal=True))
        mate = await attach(network, "mate", network=make_network(2, internal=True), host=3)
        async with serving(lab.outside, 80, "outside"), serving(mate.network_namespace, 80, "mate"):
            for protocol in ("tcp", "udp"):
                answer = await reach(here.network_namespace, OUTSIDE_ADDRESS, 80, protocol=protocol)
                assert answer == f"outside {HOST_ADDRESS}"
            assert await reach(shut.network_namespace, OUTSIDE_ADDRESS, 80) == DENIED
            assert await reach(shut.network_namespace, mate.address, 80) == f"mate {shut.address}"


async def test_no_instance_reaches_the_metadata_of_a_cloud(lab: Lab) -> None:
    """169.254.169.254 answers with the credentials of the host."""
    metadata = "169.254.169.254"
    with inside(lab.outside):
        sh("ip", "address", "add", f"{metadata}/32", "dev", "eth0")
    sh("ip", "route", "add", f"{metadata}/32", "via", OUTSIDE_ADDRESS)
    async with driver(lab) as network, serving(lab.outside, 80, "secret"):
        here = await attach(network, "here")
        assert await reach(None, metadata, 80) == f"secret {HOST_ADDRESS}"
        assert await reach(here.network_namespace, metadata, 80) == DENIED


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_published_port_is_reached_from_everywhere(lab: Lab, protocol: str) -> None:
    port = Port(host_port=8080, instance_port=80, protocol=protocol)
    async with driver(lab) as network:
        web = await attach(network, "web", ports=(port,))
        mate = await attach(network, "mate", host=3)
        far = await attach(network, "far", network=make_network(2))
        shut = await attach(network, "shut", network=make_network(3, internal=True))
        gateway = network._identity.gateway
        async with serving(web.network_namespace, 80, "web"):
            assert await reach(lab.outside, HOST_ADDRESS, 8080, protocol=protocol) == f"web {OUTSIDE_ADDRESS}"
            assert await reach(None, HOST_ADDRESS, 8080, protocol=protocol) == f"web {HOST_ADDRESS}"
            assert await reach(None, "127.0.0.1", 8080, protocol=protocol) == f"web {gateway}"
            for asker in (mate, far):
                answer = await reach(asker.network_namespace, HOST_ADDRESS, 8080, protocol=protocol)
                assert answer == f"web {asker.address}"
            assert await reach(web.network_namespace, HOST_ADDRESS, 8080, protocol=protocol) == f"web {gateway}"
            assert await reach(shut.network_namespace, HOST_ADDRESS, 8080, protocol=protocol) == DENIED
        await network.detach(web, keep_ids=False)
        assert await reach(lab.outside, HOST_ADDRESS, 8080, protocol=protocol) == DENIED


async def test_a_port_published_on_loopback_is_for_the_host_only(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", ports=(Port(host_address="127.0.0.1", host_port=8080, instance_port=80),))
        far = await attach(network, "far", network=make_network(2))
        with inside(far.network_namespace):  # whose root sends what it takes for the loopback out to the host
            Path("/proc/sys/net/ipv4/conf/all/route_localnet").write_text("1")
            sh("ip", "address", "del", "127.0.0.1/8", "dev", "lo")
            sh("ip", "route", "add", "127.0.0.0/8", "via", network._identity.gateway, "dev", "eth0", "onlink")
        async with serving(web.network_namespace, 80, "web"):
            assert await reach(None, "127.0.0.1", 8080) == f"web {network._identity.gateway}"
            assert await reach(None, "::1", 8080) == f"web {network._identity.gateway}"
            assert await reach(None, HOST_ADDRESS, 8080) == DENIED
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == DENIED
            assert await reach(far.network_namespace, "127.0.0.1", 8080, source=far.address) == DENIED


async def test_the_relay_carries_more_than_its_buffers_and_the_end_of_input(lab: Lab) -> None:
    """A megabyte each way through [::1]; the server answers only once it has seen the end of what was sent."""
    payload = os.urandom(1 << 20)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(-1))
        writer.close()
        await writer.wait_closed()

    async with driver(lab) as network:
        web = await attach(network, "web", ports=(Port(host_port=8080, instance_port=80),))
        listener = opened(web.network_namespace, socket.SOCK_STREAM)
        listener.bind(("0.0.0.0", 80))
        async with await asyncio.start_server(echo, sock=listener):
            reader, writer = await asyncio.open_connection("::1", 8080)
            writer.write(payload)
            writer.write_eof()
            assert await reader.read(-1) == payload
            writer.close()
            await writer.wait_closed()


async def test_detach_cuts_relayed_connections(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", ports=(Port(host_port=8080, instance_port=80),))
        listener = opened(web.network_namespace, socket.SOCK_STREAM)
        listener.bind(("0.0.0.0", 80))
        listener.listen()
        with listener:
            reader, writer = await asyncio.open_connection("::1", 8080)
            with (await asyncio.get_running_loop().sock_accept(listener))[0]:
                await network.detach(web, keep_ids=False)
                assert await reader.read(1) == b""
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_taken_port_is_refused_by_name_and_nothing_is_left(lab: Lab, protocol: str) -> None:
    port = Port(host_port=8080, instance_port=80, protocol=protocol)
    async with driver(lab) as network:
        await attach(network, "first", ports=(port,))
        with pytest.raises(AlveoleError, match=f"port 8080/{protocol} is already used by instance first") as taken:
            await attach(network, "second", host=3, ports=(Port(host_port=8081, instance_port=80), port))
        assert taken.value.code is ErrorCode.EXISTS
        await attach(network, "third", host=3, ports=(Port(host_port=8081, instance_port=80),))
        async with serving(None, 9000, "host"):
            with pytest.raises(AlveoleError, match=rf"already used by .+ \(process {os.getpid()}\)"):
                await attach(
                    network, "fourth", host=4, ports=(Port(host_port=9000, instance_port=80, protocol=protocol),)
                )


async def test_nobody_gets_a_published_port_afterwards(lab: Lab) -> None:
    """Not even a server that sets SO_REUSEADDR, as most do."""
    async with driver(lab) as network:
        web = await attach(network, "web", ports=(Port(host_port=8080, instance_port=80),))
        with pytest.raises(OSError, match="in use"):
            await asyncio.start_server(lambda _, __: None, "0.0.0.0", 8080, reuse_address=True)
        await network.detach(web, keep_ids=False)
        async with serving(None, 8080, "host"):
            assert await reach(None, "127.0.0.1", 8080) == "host 127.0.0.1"


@pytest.mark.parametrize("address", ["::", "localhost", "192.0.2.99", "0.0.0.0 } ; flush ruleset"])
async def test_an_address_that_is_not_the_hosts_is_refused(lab: Lab, address: str) -> None:
    async with driver(lab) as network:
        with pytest.raises(AlveoleError) as refused:
            await attach(network, "web", ports=(Port(host_address=address, host_port=8080, instance_port=80),))
        assert refused.value.code is ErrorCode.INVALID


async def test_connections_end_with_the_instance(lab: Lab) -> None:
    """A datagram stream to a published port reaches the next instance, not the address of the former."""
    port = Port(host_port=8080, instance_port=80, protocol="udp")
    async with driver(lab) as network:
        first = await attach(network, "first", ports=(port,))
        loop = asyncio.get_running_loop()
        with opened(lab.outside, socket.SOCK_DGRAM) as client:
            await loop.sock_connect(client, (HOST_ADDRESS, 8080))
            async with serving(first.network_namespace, 80, "first"):
                await loop.sock_sendall(client, b"?")
                assert (await loop.sock_recv(client, 99)).startswith(b"first")
            await network.detach(first, keep_ids=False)
            second = await attach(network, "second", host=9, ports=(port,))
            async with serving(second.network_namespace, 80, "second"), asyncio.timeout(2):
                await loop.sock_sendall(client, b"?")
                assert (await loop.sock_recv(client, 99)).startswith(b"second")


async def test_the_root_of_a_container_may_bind_port_80_and_any_user_too(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web")
        bind = "use Socket; socket(S, PF_INET, SOCK_STREAM, 0); bind(S, sockaddr_in(80, INADDR_ANY)) or die $!"
        for user in ("0", "1000"):
            enter = [
                "nsenter",
                f"--user={web.user_namespace}",
                f"--net={web.network_namespace}",
                "-S",
                user,
                "-G",
                user,
            ]
            await asyncio.to_thread(subprocess.run, [*enter, "perl", "-e", bind], check=True)


async def test_host_and_none_mode(lab: Lab) -> None:
    async with driver(lab) as network:
        host = await attach(network, "host", mode="host")
        assert host.user_namespace
        assert (host.network_namespace, host.interface, host.address) == ("", "", "")
        none = await attach(network, "none", mode="none", shifted=False)
        assert (none.user_namespace, none.ids_base, none.interface) == ("", 0, "")
        with inside(none.network_namespace):
            assert [name for _, name in socket.if_nameindex()] == ["lo"]
        assert network.resolv_conf(none) == ""
        assert network.resolv_conf(host) == Path("/etc/resolv.conf").read_text()


async def test_an_id_range_stays_with_its_instance(lab: Lab) -> None:
    async with driver(lab, pool_size=0) as network:
        first = await attach(network, "first")
        await network.detach(first, keep_ids=True)
        other = await attach(network, "other", host=3)
        assert other.ids_base != first.ids_base
        again = await attach(network, "first", ids=Ids(base=first.ids_base))
        assert again.ids_base == first.ids_base
        await network.detach(again, keep_ids=True)
        await network.release_ids(Ids(base=first.ids_base))
        assert (await attach(network, "third", host=4)).ids_base == first.ids_base


async def test_attaching_again_gives_back_an_address_that_was_taken_off(lab: Lab) -> None:
    """A sandbox takes the address off its device when it starts."""
    async with driver(lab) as network:
        box = await attach(network, "box", shifted=False)
        with inside(box.network_namespace):
            sh("ip", "address", "flush", "dev", "eth0")
        assert await attach(network, "box", shifted=False) == box
        async with serving(box.network_namespace, 80, "box"):
            assert await reach(None, box.address, 80) != DENIED


async def test_two_daemons_share_a_host(lab: Lab) -> None:
    """Each keeps to its own; forwarding is switched off again by the last."""
    before = lab.remains()
    async with driver(lab, 0) as one:
        async with driver(lab, 1) as two:
            ours = await attach(one, "web", ports=(Port(host_port=8080, instance_port=80),))
            theirs = await attach(two, "web", network=make_network(daemon=1))
            async with serving(ours.network_namespace, 80, "ours"), serving(theirs.network_namespace, 80, "theirs"):
                assert await reach(ours.network_namespace, theirs.address, 80) == DENIED
                assert await reach(theirs.network_namespace, ours.address, 80) == DENIED
                assert await reach(theirs.network_namespace, HOST_ADDRESS, 8080) != DENIED
        async with serving(ours.network_namespace, 80, "ours"):
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"ours {OUTSIDE_ADDRESS}"
    assert lab.remains() == before


async def test_forwarding_between_devices_of_others_stays_denied(lab: Lab) -> None:
    """A host that was no router is none for others after Alveole came; one that was, still is."""
    with neighbour("other0", "203.0.113.1", "203.0.113.2") as third:
        for namespace, subnet, router in (
            (lab.outside, "203.0.113.0/24", HOST_ADDRESS),
            (third, "198.51.100.0/24", "203.0.113.1"),
        ):
            with inside(namespace):
                sh("ip", "route", "add", subnet, "via", router)
        async with serving(third, 80, "third"):
            async with driver(lab):
                assert await reach(lab.outside, "203.0.113.2", 80) == DENIED
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            async with driver(lab):
                assert await reach(lab.outside, "203.0.113.2", 80) == f"third {OUTSIDE_ADDRESS}"
            assert Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"
