"""DNS as instances see it: over UDP and TCP, their own names and those of the world."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import pytest

from alveole.model.error import AlveoleError, ErrorCode
from alveole.network.dns import Upstream
from tests.integration.network_lab import Lab, attach, driver, laboratory, make_network, opened, serving

pytestmark = pytest.mark.root

LONG = [f"198.18.{n}.{m}" for n in range(2) for m in range(150)]  # more than fits a datagram


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path) as made:
        yield made


async def _ask(
    where: str | None, gateway: str, name: str, kind: str = "A", *, tcp: bool = False
) -> tuple[str, list[str], bool]:
    """Code, records, and whether the answer was cut, as a program inside sees them."""
    query = dns.message.make_query(name, kind)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        with opened(where, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as client:
            await loop.sock_connect(client, (gateway, 53))
            await loop.sock_sendall(client, query.to_wire(prepend_length=tcp))
            wire = await loop.sock_recv(client, 65535)
            while tcp and len(wire) < 2 + struct.unpack_from(">H", wire)[0]:
                wire += await loop.sock_recv(client, 65535)
    answer = dns.message.from_wire(wire[2 * tcp :])
    assert query.is_response(answer)
    records = [record.to_text() for group in answer.answer for record in group]
    return dns.rcode.to_text(answer.rcode()), records, bool(answer.flags & dns.flags.TC)


@asynccontextmanager
async def _resolver(asked: list[tuple[str, int]]) -> AsyncIterator[Upstream]:
    """A resolver of the world on the host's loopback: knows example.org, and long.example.org with 300 addresses."""

    def answer(wire: bytes, *, limit: int) -> bytes:
        query = dns.message.from_wire(wire)
        asked.append((query.question[0].name.to_text(), query.id))
        response = dns.message.make_response(query)
        if query.question[0].name.to_text().startswith("long"):
            response.answer.append(dns.rrset.from_text_list(query.question[0].name, 60, "IN", "A", LONG))
        else:
            response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "198.18.0.1"))
        return response.to_wire(max_size=limit, prefer_truncation=True)

    class Datagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(answer(data, limit=512), addr)

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = answer(await reader.readexactly(struct.unpack(">H", await reader.readexactly(2))[0]), limit=65535)
        writer.write(struct.pack(">H", len(wire)) + wire)
        writer.close()
        await writer.wait_closed()

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Datagrams, ("127.0.0.1", 5300))
    async with await asyncio.start_server(stream, "127.0.0.1", 5300):
        yield Upstream("127.0.0.1", 5300)
    transport.close()


@pytest.mark.parametrize("tcp", [False, True])
async def test_instances_find_each_other_by_name(lab: Lab, tcp: bool) -> None:
    async with driver(lab, upstreams=tuple) as network:
        gateway = network._identity.gateway
        here = await attach(network, "here")
        near = await attach(network, "near", host=3)
        await attach(network, "far", network=make_network(2))
        inside = here.network_namespace
        assert network.resolv_conf(here) == f"nameserver {gateway}\noptions ndots:0\n"
        assert await _ask(inside, gateway, "near", tcp=tcp) == ("NOERROR", [near.address], False)
        assert await _ask(inside, gateway, "near.alveole", "AAAA", tcp=tcp) == ("NOERROR", [], False)
        assert await _ask(inside, gateway, "far.alveole", tcp=tcp) == ("NXDOMAIN", [], False)
        await network.detach(near, keep_ids=False)
        assert await _ask(inside, gateway, "near.alveole", tcp=tcp) == ("NXDOMAIN", [], False)
        assert await _ask(inside, gateway, "example.org", tcp=tcp) == ("SERVFAIL", [], False)  # nobody to ask


async def test_other_names_are_asked_of_the_hosts_resolvers(lab: Lab) -> None:
    """The first that answers is believed; what does not fit a datagram is cut for UDP and whole for TCP."""
    asked: list[tuple[str, int]] = []
    async with _resolver(asked) as resolver:
        silent = Upstream("127.0.0.1", 5301)
        async with driver(lab, upstreams=lambda: (silent, resolver)) as network:
            gateway = network._identity.gateway
            here = await attach(network, "here")
            shut = await attach(network, "shut", network=make_network(2, internal=True))
            inside = here.network_namespace
            for tcp in (False, True):
                assert await _ask(inside, gateway, "example.org", tcp=tcp) == ("NOERROR", ["198.18.0.1"], False)
            assert (await _ask(inside, gateway, "long.example.org"))[2]
            code, records, cut = await _ask(inside, gateway, "long.example.org", tcp=True)
            assert (code, sorted(records), cut) == ("NOERROR", sorted(LONG), False)
            before = len(asked)
            assert await _ask(shut.network_namespace, gateway, "example.org") == ("NXDOMAIN", [], False)
            assert len(asked) == before


async def test_ids_towards_resolvers_are_not_those_of_the_asker(lab: Lab) -> None:
    """An instance that chose them could have forged answers believed."""
    asked: list[tuple[str, int]] = []
    async with _resolver(asked) as resolver, driver(lab, upstreams=lambda: (resolver,)) as network:
        here = await attach(network, "here")
        query = dns.message.make_query("example.org", "A", id=7)
        loop = asyncio.get_running_loop()
        with opened(here.network_namespace, socket.SOCK_DGRAM) as client:
            await loop.sock_connect(client, (network._identity.gateway, 53))
            for _ in range(4):
                await loop.sock_sendall(client, query.to_wire())
                assert dns.message.from_wire(await loop.sock_recv(client, 512)).id == 7
        assert len({identifier for _, identifier in asked}) > 1


async def test_rubbish_and_idle_connections_do_not_stop_it(lab: Lab) -> None:
    async with driver(lab, upstreams=tuple) as network:
        gateway = network._identity.gateway
        here = await attach(network, "here")
        loop = asyncio.get_running_loop()
        with opened(here.network_namespace, socket.SOCK_DGRAM) as client:
            await loop.sock_connect(client, (gateway, 53))
            for rubbish in (b"", b"\0", b"\xff" * 600, bytes(12), b"\xc0\x0c" * 40):
                await loop.sock_sendall(client, rubbish)
        idle = [opened(here.network_namespace, socket.SOCK_STREAM) for _ in range(30)]
        for client in idle:
            await loop.sock_connect(client, (gateway, 53))
        await loop.sock_sendall(idle[0], b"\xff\xff rubbish")
        assert await _ask(here.network_namespace, gateway, "here") == ("NOERROR", [here.address], False)
        ended = [await asyncio.wait_for(loop.sock_recv(client, 1), 1) for client in idle[16:]]
        assert ended == [b""] * 14  # more than a few connections of one instance are closed at once
        for client in idle:
            client.close()


async def test_a_flood_of_one_instance_is_cut_and_another_is_still_answered(lab: Lab) -> None:
    async with driver(lab, upstreams=tuple) as network:
        gateway = network._identity.gateway
        here = await attach(network, "here")
        near = await attach(network, "near", host=3)
        wire, answers = dns.message.make_query("near", "A").to_wire(), 0
        with opened(here.network_namespace, socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            await asyncio.get_running_loop().sock_connect(client, (gateway, 53))
            for _ in range(4000):  # sent before the server gets its turn
                client.send(wire)
            assert (await _ask(near.network_namespace, gateway, "here"))[0] == "NOERROR"
            try:
                async with asyncio.timeout(3):
                    while await asyncio.get_running_loop().sock_recv(client, 512):
                        answers += 1
            except TimeoutError:
                assert 100 < answers < 1000


async def test_a_program_at_port_53_is_named(lab: Lab) -> None:
    async with serving(None, 53, "other"):
        with pytest.raises(
            AlveoleError, match=r"DNS port 53 on 10\.80\.0\.1 is already used by .+ \(process \d+\)"
        ) as taken:
            async with driver(lab):
                pytest.fail("it opened")
        assert taken.value.code is ErrorCode.EXISTS
