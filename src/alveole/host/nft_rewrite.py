"""The one nftables rule that the ``nft`` language cannot say: write bytes behind an ICMP header and mend its checksum.

An ICMP error carries the beginning of the packet it is about. ``nft`` writes there (``@th,160,32 set ...``) but leaves
the checksum wrong; the kernel's expression can do both.
"""

import socket
import struct
from collections.abc import Sequence

from alveole.host.netlink import Message, Netlink, attribute, nested, text

ICMP_INNER_SOURCE, ICMP_INNER_DESTINATION = 8 + 12, 8 + 16
"""Of the packet within an ICMP error: where its addresses are, counted from the ICMP header."""

_HEADER = struct.Struct(">BBH")  # family, version, resource
_SUBSYSTEM = 10  # nftables
_BEGIN, _END, _NEWRULE = 0x10, 0x11, _SUBSYSTEM << 8 | 6
_CREATE, _APPEND = 0x400, 0x800
_REGISTER_1, _TRANSPORT_HEADER, _INTERNET_CHECKSUM, _ICMP_CHECKSUM_OFFSET = 1, 2, 1, 2


def append(connection: Netlink, rules: Sequence[Message]) -> None:
    """Carry out ``rewrite_icmp`` for all of them in one transaction, on a socket of family NETFILTER. Blocks."""
    batch = _HEADER.pack(socket.AF_UNSPEC, 0, _SUBSYSTEM)
    connection.send_batch(Message(_BEGIN, 0, batch, "begin"), rules, Message(_END, 0, batch, "commit"))


def rewrite_icmp(table: str, chain: str, offset: int, address: str) -> Message:
    """A rule at the end of a chain of family ip: write ``address`` at ``offset`` of the ICMP message."""
    value = nested(2, attribute(1, socket.inet_aton(address)))
    load = _expression("immediate", attribute(1, _number(_REGISTER_1)), value)
    write = _expression(
        "payload",
        attribute(5, _number(_REGISTER_1)),
        attribute(2, _number(_TRANSPORT_HEADER)),
        attribute(3, _number(offset)),
        attribute(4, _number(4)),
        attribute(6, _number(_INTERNET_CHECKSUM)),
        attribute(7, _number(_ICMP_CHECKSUM_OFFSET)),
    )
    rule = text(1, table) + text(2, chain) + nested(4, load, write)
    about = f"rewrite ICMP errors in chain {chain}"
    return Message(_NEWRULE, _CREATE | _APPEND, _HEADER.pack(socket.AF_INET, 0, 0) + rule, about)


def _expression(name: str, *values: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *values))


def _number(value: int) -> bytes:
    return struct.pack(">I", value)
