"""Network devices, addresses, routes and connection tracking over netlink: one system call where `ip` needs a process.

Messages are built by pure functions and sent by :class:`Netlink`, many at once. Only the standard library is imported:
the namespace helper loads this too.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

ROUTE, NETFILTER = 0, 12  # netlink families

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # family, device type, index, flags, changed flags
_ADDRESS = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, dst len, src len, tos, table, protocol, scope, type, flags
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_NETFILTER = struct.Struct(">BBH")  # family, version, resource

_F_REQUEST, _F_ACK, _F_REPLACE, _F_EXCL, _F_CREATE = 1, 4, 0x100, 0x200, 0x400
_F_ACK_TLVS, _F_CAPPED = 0x200, 0x100
_ERROR = 2
_NEWLINK, _DELLINK, _GETLINK, _NEWADDR, _NEWROUTE, _DELROUTE, _NEWNEIGH = 16, 17, 18, 20, 24, 25, 28
_CONNTRACK_DELETE = 0x0102  # subsystem 1 (connection tracking), message 2
_NESTED = 0x8000

_UP, _NOARP = 0x1, 0x80
_SCOPE_LINK, _SCOPE_GLOBAL = 253, 0
_MAIN_TABLE, _PROTOCOL_STATIC, _UNICAST, _UNREACHABLE = 254, 4, 1, 7
_ONLINK = 4
_PERMANENT = 0x80

_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_RECEIVE_BYTES = 1 << 16


class Message(NamedTuple):
    """A request without its sequence number, and what it is about, for error texts."""

    type: int
    flags: int
    payload: bytes
    about: str


class NetlinkError(OSError):
    """The kernel refused a message; ``strerror`` carries its own words."""


class Netlink:
    """A netlink socket in the network namespace of the calling thread. Its methods block: call them in a thread."""

    def __init__(self, family: int = ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, messages: Sequence[Message], *, ignore: Sequence[int] = ()) -> None:
        """Send all, in order; each is carried out whether or not one before it failed.

        Raises NetlinkError for the first refusal whose errno is not in ``ignore``.
        """
        first = self._sequence + 1
        wire = b""
        for message in messages:
            self._sequence += 1
            wire += _packed(message, _F_ACK, self._sequence)
        self._socket.sendall(wire)
        failure: NetlinkError | None = None
        for _ in messages:
            sequence, error = self._acknowledgement()
            if error and error.errno not in ignore:
                about = messages[sequence - first].about
                failure = failure or NetlinkError(error.errno, f"{about}: {error.strerror}")
        if failure:
            raise failure

    def send_batch(self, begin: Message, messages: Sequence[Message], end: Message) -> None:
        """Send a transaction: all of ``messages``, or none. Raises NetlinkError for the first refusal.

        Whether ``begin`` and ``end`` are acknowledged depends on the kernel: only their refusals are looked at.
        """
        first = self._sequence + 1
        self._sequence += len(messages) + 2
        marked = ((begin, 0), *((message, _F_ACK) for message in messages), (end, 0))
        self._socket.sendall(b"".join(_packed(message, ack, first + n) for n, (message, ack) in enumerate(marked)))
        for _ in messages:
            sequence, error = self._acknowledgement()
            if error:
                about = marked[sequence - first][0].about
                raise NetlinkError(error.errno, f"{about}: {error.strerror}")

    def link_index(self, name: str) -> int | None:
        """The index of a device, or None if there is none of that name."""
        self._sequence += 1
        message = Message(_GETLINK, 0, _LINK.pack(0, 0, 0, 0, 0) + text(3, name), f"find {name}")
        self._socket.sendall(_packed(message, 0, self._sequence))
        data = self._socket.recv(_RECEIVE_BYTES)
        kind, _, body = next(_unpacked(data))
        if kind == _ERROR:
            number = -struct.unpack_from("=i", body)[0]
            if number == errno.ENODEV:
                return None
            raise NetlinkError(number, f"{message.about}: {os.strerror(number)}")
        return int(_LINK.unpack_from(body)[2])

    def index_of(self, name: str) -> int:
        """The index of a device that must be there. Raises NetlinkError(ENODEV)."""
        index = self.link_index(name)
        if index is None:
            raise NetlinkError(errno.ENODEV, f"network device {name} is gone")
        return index

    def _acknowledgement(self) -> tuple[int, OSError | None]:
        while True:
            data = self._socket.recv(_RECEIVE_BYTES)
            for kind, (flags, sequence), body in _unpacked(data):
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    return sequence, OSError(number, _refusal(number, flags, body)) if number else None


def _packed(message: Message, flags: int, sequence: int) -> bytes:
    length = _HEADER.size + len(message.payload)
    return _HEADER.pack(length, message.type, message.flags | flags | _F_REQUEST, sequence, 0) + message.payload


def _unpacked(data: bytes) -> Iterator[tuple[int, tuple[int, int], bytes]]:
    """The messages of one datagram: type, (flags, sequence), payload."""
    while data:
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data)
        yield kind, (flags, sequence), data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def _refusal(number: int, flags: int, body: bytes) -> str:
    """The kernel's explanation (attribute 1 of an extended acknowledgement), else the errno's."""
    if not flags & _F_ACK_TLVS:
        return os.strerror(number)
    length = struct.unpack_from("=I", body, 4)[0]
    rest = body[4 + (_HEADER.size if flags & _F_CAPPED else length) :]
    while len(rest) >= 4:
        size, kind = struct.unpack_from("=HH", rest)
        if kind == 1:
            return rest[4:size].rstrip(b"\0").decode(errors="replace")
        rest = rest[(size + 3) & ~3 :]
    return os.strerror(number)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *values: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(values))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _mac(value: str) -> bytes:
    return bytes.fromhex(value.replace(":", ""))


def new_bridge(name: str) -> Message:
    """A bridge without ports: a device to hold an address (``dummy`` is absent from small kernels)."""
    payload = _LINK.pack(0, 0, 0, 0, 0) + text(3, name) + nested(18, text(1, "bridge"))
    return Message(_NEWLINK, _F_CREATE | _F_EXCL, payload, f"add device {name}")


def new_detour(name: str) -> Message:
    """A device that sends what was redirected to it back to where it was received (``ifb``)."""
    payload = _LINK.pack(0, 0, 0, 0, 0) + text(3, name) + nested(18, text(1, "ifb"))
    return Message(_NEWLINK, _F_CREATE | _F_EXCL, payload, f"add device {name} (ifb)")


def new_veth(name: str, mac: str, peer_name: str, peer_mac: str, peer_namespace: int) -> Message:
    """A veth pair, its peer made directly in the network namespace open as ``peer_namespace``."""
    peer = _LINK.pack(0, 0, 0, 0, 0) + text(3, peer_name) + attribute(1, _mac(peer_mac))
    peer += attribute(28, struct.pack("=i", peer_namespace))
    kind = nested(18, text(1, "veth"), nested(2, attribute(1 | _NESTED, peer)))
    payload = _LINK.pack(0, 0, 0, 0, 0) + text(3, name) + attribute(1, _mac(mac)) + kind
    return Message(_NEWLINK, _F_CREATE | _F_EXCL, payload, f"add devices {name} and {peer_name}")


def delete_link(name: str) -> Message:
    return Message(_DELLINK, 0, _LINK.pack(0, 0, 0, 0, 0) + text(3, name), f"remove device {name}")


def link_up(name: str, *, arp: bool = True, mac: str = "") -> Message:
    """Up; without ``arp`` it neither answers nor learns from ARP, so that its peer cannot fill the host's table."""
    flags, mask = (_UP, _UP) if arp else (_UP | _NOARP, _UP | _NOARP)
    payload = _LINK.pack(0, 0, 0, flags, mask) + text(3, name) + (attribute(1, _mac(mac)) if mac else b"")
    return Message(_NEWLINK, 0, payload, f"set {name} up")


def new_address(index: int, address: str) -> Message:
    """``address``/32 on a device."""
    value = socket.inet_aton(address)
    payload = _ADDRESS.pack(socket.AF_INET, 32, 0, _SCOPE_GLOBAL, index) + attribute(2, value) + attribute(1, value)
    return Message(_NEWADDR, _F_CREATE | _F_REPLACE, payload, f"add address {address}")


def new_host_route(index: int, address: str, source: str) -> Message:
    """``address``/32 is behind this device; the host speaks to it from ``source``."""
    payload = _ROUTE.pack(socket.AF_INET, 32, 0, 0, _MAIN_TABLE, _PROTOCOL_STATIC, _SCOPE_LINK, _UNICAST, 0)
    payload += attribute(1, socket.inet_aton(address)) + attribute(4, struct.pack("=i", index))
    payload += attribute(7, socket.inet_aton(source))
    return Message(_NEWROUTE, _F_CREATE | _F_REPLACE, payload, f"add route to {address}")


def new_default_route(index: int, gateway: str) -> Message:
    """Everything goes to ``gateway``, which is taken to be on this link whatever its address."""
    payload = _ROUTE.pack(socket.AF_INET, 0, 0, 0, _MAIN_TABLE, _PROTOCOL_STATIC, _SCOPE_GLOBAL, _UNICAST, _ONLINK)
    payload += attribute(5, socket.inet_aton(gateway)) + attribute(4, struct.pack("=i", index))
    return Message(_NEWROUTE, _F_CREATE | _F_REPLACE, payload, f"add default route via {gateway}")


def new_dead_end(network: str) -> Message:
    """What has no route of its own in ``network`` is unreachable, and does not leave by the default route."""
    return Message(_NEWROUTE, _F_CREATE | _F_REPLACE, _dead_end(network), f"add unreachable route to {network}")


def delete_dead_end(network: str) -> Message:
    return Message(_DELROUTE, 0, _dead_end(network), f"remove unreachable route to {network}")


def _dead_end(network: str) -> bytes:
    address, _, length = network.partition("/")
    head = (socket.AF_INET, int(length), 0, 0, _MAIN_TABLE, _PROTOCOL_STATIC, _SCOPE_GLOBAL, _UNREACHABLE, 0)
    return _ROUTE.pack(*head) + attribute(1, socket.inet_aton(address))


def new_neighbour(index: int, address: str, mac: str) -> Message:
    """A permanent entry: never asked for, never given up, and not counted against the host's table limit."""
    payload = _NEIGHBOUR.pack(socket.AF_INET, index, _PERMANENT, 0, 0)
    payload += attribute(1, socket.inet_aton(address)) + attribute(2, _mac(mac))
    return Message(_NEWNEIGH, _F_CREATE | _F_REPLACE, payload, f"add neighbour {address}")


def forget_connections(address: str) -> tuple[Message, Message]:
    """Drop tracked connections from ``address`` and those answered by it; for a socket of family NETFILTER."""
    is_source = nested(1, attribute(1, socket.inet_aton(address)))  # of a direction, whose flag 1 says to compare it
    flag, none = struct.pack("=I", 1), struct.pack("=I", 0)
    by_source = nested(1, is_source) + nested(25, attribute(1, flag), attribute(2, none))
    by_answer = nested(2, is_source) + nested(25, attribute(1, none), attribute(2, flag))
    header = _NETFILTER.pack(socket.AF_INET, 0, 0)
    about = f"forget connections of {address}"
    return (
        Message(_CONNTRACK_DELETE, 0, header + by_source, about),
        Message(_CONNTRACK_DELETE, 0, header + by_answer, about),
    )
