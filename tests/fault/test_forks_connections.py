"""Established TCP connections are the original's, awake or asleep. What a fork has of them is dead, and harmless.

A client on another instance is connected to an echo of the original's, which speaks only when spoken to, and to a
clock, which speaks by itself.
"""

import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import pytest

from tests.fault.conftest import MakeVictim, finish
from tests.fault.frozen import LONG_S
from tests.fault.host import SETTLE_S, Victim, reachable
from tests.integration.daemon import until
from tests.integration.network_lab import inside

pytestmark = pytest.mark.root
ECHO, CLOCK = 5000, 5001
_SERVER = (
    f"busybox nc -ll -p {ECHO} -e cat & exec busybox nc -ll -p {CLOCK} -e sh -c 'while echo tick; do sleep 0.1; done'"
)
_PATIENCE_S = 120.0  # for a peer that sends again what was not answered, with longer and longer pauses
_RESET = 0x04
_ALL = 0x0003  # what comes and what goes


@pytest.fixture(scope="module")
def shared(make_victim: MakeVictim) -> Iterator[Victim]:
    made = make_victim()
    try:
        yield made
        finish(made)
    finally:
        made.destroy()


@pytest.fixture
def victim(shared: Victim) -> Iterator[Victim]:
    yield shared
    shared.clear()


@dataclass(frozen=True)
class Packet:
    """A TCP segment, as the client's host sees it."""

    source: str
    source_port: int
    target: str
    flags: int


class Client:
    """Who is connected to an instance, in the network namespace of another instance."""

    def __init__(self, victim: Victim, address: str) -> None:
        self.address = victim.instance("client")["address"]
        self._namespace = f"/proc/{victim.instance('client')['status']['pid']}/ns/net"
        with inside(self._namespace):
            self._wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL))
            self.echo, self.clock = (socket.create_connection((address, port), SETTLE_S) for port in (ECHO, CLOCK))
        self._wire.setblocking(False)
        self.echo.settimeout(_PATIENCE_S)
        self.clock.settimeout(_PATIENCE_S)

    def echoes(self, word: bytes) -> bool:
        self.echo.sendall(word)
        return self.answers(word)

    def answers(self, word: bytes) -> bool:
        return received(self.echo, len(word)) == word

    def ticks(self, count: int = 10) -> bool:
        """The clock goes on."""
        ahead = select.select([self.clock], [], [], 0)[0]
        while ahead and self.clock.recv(4096):
            ahead = select.select([self.clock], [], [], 0)[0]
        return b"tick" in received(self.clock, 5 * count)

    def seen(self) -> list[Packet]:
        """TCP that came and went since last asked."""
        found = []
        while select.select([self._wire], [], [], 0)[0]:
            packet = self._wire.recv(2048)
            start = 4 * (packet[0] & 15)
            if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_TCP:
                source, target = (str(IPv4Address(packet[at : at + 4])) for at in (12, 16))
                (port,) = struct.unpack_from(">H", packet, start)
                found.append(Packet(source, port, target, packet[start + 13]))
        return found

    def close(self) -> None:
        for one in (self._wire, self.echo, self.clock):
            one.close()


def received(connection: socket.socket, count: int) -> bytes:
    """So many bytes; fewer only if the other end has closed it."""
    content = b""
    while len(content) < count and (more := connection.recv(count - len(content))):
        content += more
    return content


@contextmanager
def connected(victim: Victim) -> Iterator[tuple[Client, dict[str, Any]]]:
    """(the client, the original's record)"""
    small = ("--isolation", "vm", "--memory", "128m")
    victim.ok("run", "-d", "--name", "client", "busybox", "sleep", "600")
    victim.ok("run", "-d", "--name", "original", *small, "busybox", "sh", "-c", _SERVER, timeout=LONG_S)
    record = victim.instance("original")
    until(lambda: all(reachable(record["address"], port) for port in (ECHO, CLOCK)), SETTLE_S, "its servers")
    client = Client(victim, record["address"])
    try:
        assert client.echoes(b"before")
        assert client.ticks()
        yield client, record
    finally:
        client.close()


def held(victim: Victim, name: str, client: Client, port: int) -> bool:
    """Whether the instance has an established connection with the client at this port."""
    lines = victim.ok("exec", name, "busybox", "netstat", "-tn").splitlines()
    return any(f":{port} " in line and f"{client.address}:" in line and "ESTABLISHED" in line for line in lines)


def test_connections_stay_with_the_original(victim: Victim) -> None:
    with connected(victim) as (client, original):
        client.seen()
        victim.ok("fork", "--name", "twin", "original", timeout=LONG_S)
        twin = victim.instance("twin")
        assert client.ticks()
        assert client.echoes(b"during")
        # What the fork says by itself is refused by the client's kernel, which ends it; what is silent, it keeps.
        until(lambda: not held(victim, "twin", client, CLOCK), LONG_S, "an end of the fork's copy that speaks")
        assert held(victim, "twin", client, ECHO)
        assert held(victim, "original", client, ECHO)
        assert held(victim, "original", client, CLOCK)
        packets = client.seen()
        assert {packet.source for packet in packets} <= {client.address, original["address"], twin["address"]}
        assert not [packet for packet in packets if packet.source == original["address"] and packet.flags & _RESET]
        to_twin = [packet for packet in packets if packet.target == twin["address"]]
        assert to_twin
        assert all(packet.flags & _RESET for packet in to_twin)
        victim.ok("stop", "-t", "0", "twin")
        assert client.echoes(b"after")
        assert client.ticks()
        with inside(f"/proc/{victim.instance('client')['status']['pid']}/ns/net"):
            assert reachable(original["address"], ECHO)  # it takes new ones


def test_a_fork_takes_connections_of_its_own(victim: Victim) -> None:
    with connected(victim) as (client, _):
        victim.ok("fork", "--name", "twin", "original", timeout=LONG_S)
        other = Client(victim, victim.instance("twin")["address"])
        try:
            assert other.echoes(b"of the twin")
            assert other.ticks()
            assert client.echoes(b"of the original")
        finally:
            other.close()


def test_a_silent_connection_sleeps_too(victim: Victim) -> None:
    with connected(victim) as (client, original):
        client.clock.close()
        victim.ok("sleep", "original")
        victim.ok("wake", "original")
        assert victim.instance("original")["address"] == original["address"]
        assert client.echoes(b"after")


def test_what_is_sent_to_one_that_sleeps_arrives_when_it_wakes(victim: Victim) -> None:
    """The peer's kernel sends it again and again, as for any host that cannot be reached for a while."""
    with connected(victim) as (client, _):
        victim.ok("sleep", "original")
        client.echo.sendall(b"while asleep")
        assert not select.select([client.echo], [], [], 1.0)[0]
        victim.ok("wake", "original")
        assert client.answers(b"while asleep")
        assert client.ticks()


def test_one_that_it_had_opened_itself(victim: Victim) -> None:
    """A program of the fork's that uses it is told at once that it is no more; the other end hears nothing of that."""
    victim.ok("run", "-d", "--name", "client", "busybox", "sleep", "600")
    client = victim.instance("client")
    with inside(f"/proc/{client['status']['pid']}/ns/net"):
        server = socket.create_server((client["address"], ECHO))
    with server:
        server.settimeout(LONG_S)
        script = f"while sleep 0.2; do echo beat; done | busybox nc {client['address']} {ECHO}"
        small = ("--isolation", "vm", "--memory", "128m")
        victim.ok("run", "-d", "--name", "original", *small, "busybox", "sh", "-c", script, timeout=LONG_S)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(SETTLE_S)
            assert received(connection, 5) == b"beat\n"
            victim.ok("fork", "--name", "twin", "original", timeout=LONG_S)
            victim.wait_phase("twin", "exited", LONG_S)
            connection.recv(1 << 16)  # what had come meanwhile
            assert b"beat" in received(connection, 25)
            assert victim.phase("original") == "running"
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()
