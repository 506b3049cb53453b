"""Host ports of published instances: each is held by a bound socket, so that nobody else gets it meanwhile.

The socket never listens: packets for the port are sent on to the instance before they would reach it.
"""

import errno
import socket
from collections.abc import Collection
from functools import partial
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

from alveole.host.blocking import in_thread
from alveole.model.error import AlveoleError, ErrorCode, invalid
from alveole.model.instance import Port
from alveole.network.rules import ANY_ADDRESS

_TYPES = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


class HostPorts:
    """Which instance holds which host ports."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, dict[Port, socket.socket]]] = {}

    async def reserve(self, instance_id: str, name: str, ports: Collection[Port]) -> None:
        """Hold these ports for an instance, all or none.

        Raises AlveoleError: EXISTS naming the port and who has it, INVALID if it is not a port of this host.
        """
        _, held = self._held.setdefault(instance_id, (name, {}))
        try:
            for port in ports:
                if port not in held:
                    held[port] = await self._bind(port)
        except BaseException:
            self.release(instance_id)
            raise

    def release(self, instance_id: str) -> None:
        """Let go of all ports of an instance. Fine if it has none."""
        _, held = self._held.pop(instance_id, ("", {}))
        for reservation in held.values():
            reservation.close()

    def close(self) -> None:
        for instance_id in list(self._held):
            self.release(instance_id)

    async def _bind(self, port: Port) -> socket.socket:
        try:
            return _bound(port, checked_address(port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise await taken(port, self._holder(port)) from error
            raise invalid(
                f"port {port.host_address}:{port.host_port}/{port.protocol} cannot be published: {error.strerror}",
                hint="publish on an IPv4 address of this host, or on all",
            ) from error

    def _holder(self, wanted: Port) -> str:
        for name, held in self._held.values():
            if any(_overlap(port, wanted) for port in held):
                return f"instance {name}"
        return ""


async def taken(port: Port, holder: str = "") -> AlveoleError:
    """That a port is used, by ``holder`` or else by the process that can be found at it."""
    holder = holder or await process_at(port.host_port, port.protocol)
    return AlveoleError(
        ErrorCode.EXISTS,
        f"port {port.host_port}/{port.protocol} is already used by {holder or 'another program'}",
        hint="choose another host port, or stop what uses this one",
    )


def checked_address(port: Port) -> str:
    """The host address in canonical form. Raises AlveoleError(INVALID) if it is not IPv4."""
    try:
        return str(IPv4Address(port.host_address))
    except AddressValueError as error:
        raise invalid(
            f"{port.host_address!r} is not an IPv4 address to publish on", hint="such as 127.0.0.1 or 0.0.0.0"
        ) from error


def _overlap(one: Port, other: Port) -> bool:
    if (one.host_port, one.protocol) != (other.host_port, other.protocol):
        return False
    return one.host_address == other.host_address or ANY_ADDRESS in {one.host_address, other.host_address}


def _bound(port: Port, address: str) -> socket.socket:
    reservation = socket.socket(socket.AF_INET, _TYPES[port.protocol] | socket.SOCK_CLOEXEC)
    try:
        # Connections of a program that just ended do not hinder us (TIME_WAIT); but once bound, nobody may share.
        reuse = port.protocol == "tcp"
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        reservation.bind((address, port.host_port))
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)
    except BaseException:
        reservation.close()
        raise
    return reservation


async def process_at(host_port: int, protocol: str) -> str:
    """Name and number of a process of this host that uses a port; empty if none can be found."""
    return await in_thread(partial(_process_at, host_port, protocol))


def _process_at(host_port: int, protocol: str) -> str:
    inodes = {f"socket:[{inode}]" for inode in _socket_inodes(host_port, protocol)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(entry.readlink()) in inodes for entry in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue  # it ended meanwhile
    return ""


def _socket_inodes(host_port: int, protocol: str) -> set[str]:
    """Inodes of sockets bound to a port, or listening at it (/proc/net: local address is field 1, inode field 9)."""
    inodes = set()
    for table in (protocol, f"{protocol}6"):
        path = Path("/proc/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == host_port and fields[9] != "0":
                inodes.add(fields[9])
    return inodes
