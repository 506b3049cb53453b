"""Names of the instances of a node, per network, and the answers to questions about them. Pure."""

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset

DOMAIN = dns.name.from_text("alveole.")
_TTL_S = 5  # names move when instances are replaced


class Member(NamedTuple):
    """An instance in a network."""

    network_id: str
    name: str
    internal: bool


class Forward(NamedTuple):
    """A question to be asked of another resolver."""

    query: dns.message.Message


class Zone:
    """NAME and NAME.alveole are answered to instances of the same network, as are their addresses (PTR)."""

    def __init__(self, pool: IPv4Network) -> None:
        self._pool = pool
        self._members: dict[str, Member] = {}
        self._addresses: dict[tuple[str, str], str] = {}

    @property
    def members(self) -> Mapping[str, Member]:
        """By address."""
        return self._members

    def add(self, address: str, member: Member) -> None:
        self._members[address] = member
        self._addresses[member.network_id, member.name.lower()] = address

    def remove(self, address: str) -> None:
        member = self._members.pop(address, None)
        if member and self._addresses.get((member.network_id, member.name.lower())) == address:
            del self._addresses[member.network_id, member.name.lower()]

    def answer(self, wire: bytes, source: str) -> dns.message.Message | Forward | None:
        """The reply to a packet from an address; None if it deserves none."""
        query = parsed(wire)
        if query is None or query.flags & dns.flags.QR:
            return None
        if query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
            return reply(query, dns.rcode.NOTIMP)
        member = self._members.get(source)
        if member is None:
            return reply(query, dns.rcode.REFUSED)
        return self._answer(query, member)

    def _answer(self, query: dns.message.Message, member: Member) -> dns.message.Message | Forward:
        question = query.question[0]
        target = _reversed(question.name)
        address, pointer = self._address(question.name, member), self._pointer(target, member)
        if address:
            return _found(query, dns.rdatatype.A, address)
        if pointer:
            return _found(query, dns.rdatatype.PTR, pointer)
        ours = question.name.is_subdomain(DOMAIN) or (target is not None and target in self._pool)
        return reply(query, dns.rcode.NXDOMAIN) if ours or member.internal else Forward(query)

    def _address(self, name: dns.name.Name, member: Member) -> str | None:
        plain = name.relativize(DOMAIN if name.is_subdomain(DOMAIN) else dns.name.root)
        return self._addresses.get((member.network_id, plain.to_text().lower()))

    def _pointer(self, target: IPv4Address | None, member: Member) -> str | None:
        known = self._members.get(str(target))
        return f"{known.name}.{DOMAIN}" if known and known.network_id == member.network_id else None


def parsed(wire: bytes) -> dns.message.Message | None:
    """A DNS message, or None if it is none."""
    try:
        return dns.message.from_wire(wire)
    except (dns.exception.DNSException, ValueError):
        return None


def reply(query: dns.message.Message, code: dns.rcode.Rcode) -> dns.message.Message:
    response = dns.message.make_response(query, recursion_available=True)
    response.set_rcode(code)
    return response


def _found(query: dns.message.Message, kind: dns.rdatatype.RdataType, value: str) -> dns.message.Message:
    """The name exists: with the record if that was asked for, without any otherwise (AAAA)."""
    response, question = reply(query, dns.rcode.NOERROR), query.question[0]
    if question.rdtype in {kind, dns.rdatatype.ANY} and question.rdclass == dns.rdataclass.IN:
        response.answer.append(dns.rrset.from_text(question.name, _TTL_S, "IN", kind, value))
    return response


def _reversed(name: dns.name.Name) -> IPv4Address | None:
    """The address that a PTR question is about."""
    try:
        return IPv4Address(dns.reversename.to_address(name))
    except (dns.exception.DNSException, ValueError):
        return None
