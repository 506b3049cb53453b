"""The DNS server of a node: answers about its instances, and asks the host's resolvers about everything else.

Who asks is known by source address, which the packet rules hold honest; they also limit its packets per second.
"""

import asyncio
import errno
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dns.asyncquery
import dns.exception
import dns.message
import dns.rcode

from alveole.model.error import AlveoleError, ErrorCode
from alveole.network.names import Forward, Zone, reply
from alveole.network.ports import process_at

log = logging.getLogger(__name__)

PORT = 53
_UPSTREAM_TIMEOUT_S = 2.0  # of each resolver, in turn
_TCP_IDLE_S = 10.0
_PENDING_AT_ONCE = 512  # questions under way to other resolvers, of the node
_PENDING_PER_SOURCE = 64
_TCP_CONNECTIONS_PER_SOURCE = 16
_UDP_BYTES = 512  # unless the question allows more
_UDP_BYTES_AT_MOST = 1232
_TCP_BYTES_AT_MOST = 65535
_RESOLV_CONF = Path("/etc/resolv.conf")


class Upstream(NamedTuple):
    address: str
    port: int = PORT


def host_resolvers() -> tuple[Upstream, ...]:
    """What the host asks, read anew each time: it may change while we run."""
    try:
        lines = _RESOLV_CONF.read_text().splitlines()
    except FileNotFoundError:
        return ()
    words = (line.split() for line in lines)
    return tuple(Upstream(word[1].partition("%")[0]) for word in words if len(word) > 1 and word[0] == "nameserver")


class DnsServer:
    """UDP and TCP on one address. Answers come from ``zone``; ``upstreams`` names the resolvers to ask, in order."""

    def __init__(self, zone: Zone, *, upstreams: Callable[[], Sequence[Upstream]] = host_resolvers) -> None:
        self._zone = zone
        self._upstreams = upstreams
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: Counter[str] = Counter()  # by source
        self._connections: Counter[str] = Counter()
        self._transport: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None

    async def open(self, address: str) -> None:
        """Begin to serve. Raises AlveoleError(EXISTS) naming who has the port."""
        if self._server:
            return
        try:
            loop = asyncio.get_running_loop()
            self._transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), (address, PORT))
            self._server = await asyncio.start_server(self._accept, address, PORT)
        except OSError as error:
            await self.close()
            if error.errno != errno.EADDRINUSE:
                raise
            holder = await process_at(PORT, "tcp") or await process_at(PORT, "udp") or "another program"
            raise AlveoleError(
                ErrorCode.EXISTS,
                f"DNS port {PORT} on {address} is already used by {holder}",
                hint="let it listen on the host's own addresses only, not on all",
            ) from error

    async def close(self) -> None:
        if self._transport:
            self._transport.close()
        if self._server:
            self._server.close()
        self._transport = self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def datagram(self, wire: bytes, peer: tuple[str, int], transport: asyncio.DatagramTransport) -> None:
        """Answer one packet, at once or when another resolver has answered."""
        answer = self._zone.answer(wire, peer[0])
        if isinstance(answer, Forward):
            if self._pending[peer[0]] < _PENDING_PER_SOURCE and self._pending.total() < _PENDING_AT_ONCE:
                self._own(self._forward_datagram(answer.query, peer, transport))
        elif answer:
            transport.sendto(answer.to_wire(), peer)

    async def _forward_datagram(
        self, query: dns.message.Message, peer: tuple[str, int], transport: asyncio.DatagramTransport
    ) -> None:
        answer = await self._ask(query, peer[0])
        if not transport.is_closing():
            transport.sendto(_datagram(answer, query), peer)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = writer.get_extra_info("peername")[0]
        if self._connections[source] < _TCP_CONNECTIONS_PER_SOURCE:
            self._own(self._serve_stream(reader, writer, source))
        else:
            writer.close()

    async def _serve_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: str) -> None:
        """One TCP connection: questions one after another, each after two bytes of length."""
        self._connections[source] += 1
        try:
            while answer := await self._answer_stream(reader, source):
                writer.write(len(answer).to_bytes(2) + answer)
                async with asyncio.timeout(_TCP_IDLE_S):
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            log.debug("a DNS client at %s hung up or was idle", source)
        finally:
            _count_down(self._connections, source)
            writer.close()

    async def _answer_stream(self, reader: asyncio.StreamReader, source: str) -> bytes:
        """Empty if the question deserves no answer, and so ends the connection."""
        async with asyncio.timeout(_TCP_IDLE_S):
            wire = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        answer = self._zone.answer(wire, source)
        if isinstance(answer, Forward):
            answer = await self._ask(answer.query, source)
        return answer.to_wire(max_size=_TCP_BYTES_AT_MOST, prefer_truncation=True) if answer else b""

    async def _ask(self, query: dns.message.Message, source: str) -> dns.message.Message:
        """The first resolver's answer, whatever it says; SERVFAIL if none answers."""
        self._pending[source] += 1
        try:
            for upstream in self._upstreams():
                answer = await _asked(query, upstream)
                if answer:
                    return answer
            return reply(query, dns.rcode.SERVFAIL)
        finally:
            _count_down(self._pending, source)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._server.datagram(data, addr, self._transport)


async def _asked(query: dns.message.Message, upstream: Upstream) -> dns.message.Message | None:
    """Ask over UDP from a random port with a random id, over TCP if the answer is cut; None without an answer."""
    question = dns.message.from_wire(query.to_wire())
    question.id = secrets.randbelow(1 << 16)
    try:
        answer, _ = await dns.asyncquery.udp_with_fallback(
            question, upstream.address, _UPSTREAM_TIMEOUT_S, upstream.port, ignore_unexpected=True, ignore_errors=True
        )
    except (dns.exception.DNSException, OSError, ValueError, EOFError) as error:
        log.debug("resolver %s did not answer: %s", upstream.address, error)
        return None
    answer.id = query.id
    return answer


def _datagram(answer: dns.message.Message, query: dns.message.Message) -> bytes:
    """The answer as one packet, cut (and marked so) where the asker cannot take more."""
    size = min(max(query.payload, _UDP_BYTES), _UDP_BYTES_AT_MOST)
    return answer.to_wire(max_size=size, prefer_truncation=True)


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
