"""A small world for network tests: a "host" and an "outside" that are network namespaces of their own.

The test's thread lives in the host namespace, so that nothing touches the real host's rules, devices or settings, and
tests can run side by side. Sockets belong to the namespace they were made in: a test talks from anywhere.
"""

import asyncio
import ctypes
import errno
import ipaddress
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alveole.host import sysctl
from alveole.host.identity import Identity
from alveole.host.netlink import Netlink, new_veth
from alveole.model.instance import Port
from alveole.model.network import Network
from alveole.network.base import Attachment
from alveole.network.routed import RoutedNetwork
from alveole.runtime.base import Ids

NEWNET = 0x40000000
HOST_ADDRESS, OUTSIDE_ADDRESS = "198.51.100.1", "198.51.100.2"
DENIED = ""
_REACH_TIMEOUT_S = 0.5
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _namespace_fd() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def inside(namespace: int | str | None) -> Iterator[None]:
    """The calling thread in another network namespace (descriptor or path); None: where it is."""
    if namespace is None:
        yield
        return
    home = _namespace_fd()
    there = os.open(namespace, os.O_RDONLY) if isinstance(namespace, str) else os.dup(namespace)
    try:
        _checked(_libc.setns(there, NEWNET))
        yield
    finally:
        _checked(_libc.setns(home, NEWNET))
        os.close(home)
        os.close(there)


def sh(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Lab:
    directory: Path
    outside: int

    def identity(self, number: int = 0) -> Identity:
        """Of the daemon ``number``: the same each time, also after its restart."""
        state = self.directory / f"daemon{number}"
        run = state / "run"
        run.mkdir(parents=True, exist_ok=True)
        return Identity(
            id=f"{number:04x}cafe",
            state=state,
            run=run,
            uid_base=(number + 1) << 28,
            pool=ipaddress.IPv4Network(f"10.{80 + number}.0.0/16"),
        )

    def remains(self) -> dict[str, object]:
        """What a driver that was closed for good must not have left in this host."""
        return {
            "devices": sorted(name for _, name in socket.if_nameindex()),
            "rules": sh("nft", "list", "ruleset"),
            "routes": sh("ip", "-4", "route").replace(" linkdown", ""),  # the kernel tells of carriers late
            "forwarding": sysctl.read("net/ipv4/ip_forward"),
            "mounts": [
                line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.directory) in line
            ],
            "files": sorted(str(path) for path in self.directory.glob("daemon*/run/*")),
        }


@contextmanager
def laboratory(directory: Path) -> Iterator[Lab]:
    """Move the test's thread into a fresh host namespace, joined to an outside one, and back at the end."""
    home = _namespace_fd()
    _checked(_libc.unshare(NEWNET))
    try:
        sh("ip", "link", "set", "lo", "up")
        sysctl.write("net/ipv4/ip_forward", "0")
        with neighbour("up0", HOST_ADDRESS, OUTSIDE_ADDRESS) as outside:
            yield Lab(directory, outside)
    finally:
        _checked(_libc.setns(home, NEWNET))
        os.close(home)


@contextmanager
def fresh_namespace() -> Iterator[int]:
    """A network namespace that lives until the end, open as the descriptor given."""
    home = _namespace_fd()
    _checked(_libc.unshare(NEWNET))
    namespace = _namespace_fd()
    _checked(_libc.setns(home, NEWNET))
    os.close(home)
    try:
        yield namespace
    finally:
        os.close(namespace)


@contextmanager
def neighbour(device: str, host_address: str, its_address: str) -> Iterator[int]:
    """Another machine beside the host, on a /24 with it: a namespace, open as the descriptor given."""
    with fresh_namespace() as namespace:
        with Netlink() as host:
            host.send([new_veth(device, "02:00:00:00:01:01", "eth0", "02:00:00:00:01:02", namespace)])
        sh("ip", "address", "add", f"{host_address}/24", "dev", device)
        sh("ip", "link", "set", device, "up")
        with inside(namespace):
            sh("ip", "address", "add", f"{its_address}/24", "dev", "eth0")
            sh("ip", "link", "set", "eth0", "up")
        yield namespace


@asynccontextmanager
async def driver(
    lab: Lab, number: int = 0, *, adopt: Collection[Attachment] = (), **options: Any
) -> AsyncIterator[RoutedNetwork]:
    """An opened driver that adopts what a former one left, closed for good at the end."""
    network = RoutedNetwork(lab.identity(number), **{"pool_size": 1, **options})
    try:
        await network.open()
        await network.recover(adopt, ())
        yield network
    finally:
        await network.close(keep=False)


def make_network(number: int = 1, *, daemon: int = 0, internal: bool = False) -> Network:
    return Network(
        id=f"{number:08x}",
        name=f"net{number}",
        subnet=f"10.{80 + daemon}.{16 * number}.0/20",
        internal=internal,
        created_at=datetime.now(UTC),
    )


async def attach(
    network_driver: RoutedNetwork,
    name: str,
    *,
    network: Network | None = None,
    host: int = 2,
    ports: tuple[Port, ...] = (),
    mode: str = "network",
    ids: Ids | None = None,
    shifted: bool = True,
    machine: str = "",
    receive_bps: int | None = None,
    send_bps: int | None = None,
) -> Attachment:
    """An instance of this name in ``network``, the ``host``-th address of its subnet."""
    network = network or make_network()
    return await network_driver.attach(
        instance_id=f"id-{name}",
        project="default",
        name=name,
        hostname=name,
        network=network if mode == "network" else None,
        mode=mode,
        address=str(ipaddress.IPv4Network(network.subnet)[host]) if mode == "network" else "",
        ports=ports,
        ids=ids,
        shifted=shifted,
        machine=machine,
        receive_bps=receive_bps,
        send_bps=send_bps,
    )


def opened(
    where: int | str | None, kind: socket.SocketKind, family: socket.AddressFamily = socket.AF_INET
) -> socket.socket:
    """A socket in a namespace; None: the host."""
    with inside(where):
        made = socket.socket(family, kind)
    made.setblocking(False)
    return made


@asynccontextmanager
async def serving(where: int | str | None, port: int, name: str, address: str = "0.0.0.0") -> AsyncIterator[None]:
    """Answer each TCP connection and each datagram at a port with ``name``, a space and the address of who asks."""

    class Answer(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(f"{name} {addr[0]}".encode(), addr)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{name} {writer.get_extra_info('peername')[0]}".encode())
        writer.close()
        await writer.wait_closed()

    stream, datagrams = opened(where, socket.SOCK_STREAM), opened(where, socket.SOCK_DGRAM)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
    stream.bind((address, port))
    datagrams.bind((address, port))
    server = await asyncio.start_server(answer, sock=stream)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Answer, sock=datagrams)
    try:
        yield
    finally:
        transport.close()
        server.close()
        await server.wait_closed()


async def reach(
    where: int | str | None, address: str, port: int, *, protocol: str = "tcp", source: str | None = None
) -> str:
    """What a server answers to somebody in a namespace; ``DENIED`` if it cannot be reached."""
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with opened(where, kind, family) as client:
        if source:
            client.bind((source, 0))
        try:
            async with asyncio.timeout(_REACH_TIMEOUT_S):
                await loop.sock_connect(client, (address, port))
                if protocol == "udp":
                    await loop.sock_sendall(client, b"?")
                return (await loop.sock_recv(client, 200)).decode()
        except OSError as error:
            if isinstance(error, TimeoutError) or error.errno in {
                errno.ECONNREFUSED,
                errno.ECONNRESET,
                errno.ENETUNREACH,
            }:
                return DENIED
            raise
