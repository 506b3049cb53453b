"""What the DNS server says about instances: by network, and unharmed by whatever is sent to it."""

from ipaddress import IPv4Network

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.reversename
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.network.names import Forward, Member, Zone

HERE, NEAR, FAR, SHUT = "10.80.16.2", "10.80.16.3", "10.80.32.2", "10.80.48.2"


def _zone() -> Zone:
    zone = Zone(IPv4Network("10.80.0.0/16"))
    zone.add(HERE, Member("one", "here", internal=False))
    zone.add(NEAR, Member("one", "near.db_1", internal=False))
    zone.add(FAR, Member("two", "far", internal=False))
    zone.add(SHUT, Member("three", "shut", internal=True))
    return zone


def _ask(name: str, kind: str = "A", source: str = HERE) -> dns.message.Message | Forward | None:
    return _zone().answer(dns.message.make_query(name, kind).to_wire(), source)


def _said(name: str, kind: str = "A", source: str = HERE) -> tuple[dns.rcode.Rcode, list[str]]:
    answer = _ask(name, kind, source)
    assert isinstance(answer, dns.message.Message)
    parsed = dns.message.from_wire(answer.to_wire())
    return parsed.rcode(), [record.to_text() for group in parsed.answer for record in group]


@pytest.mark.parametrize("name", ["here", "HERE.", "here.alveole", "Here.Alveole."])
def test_a_name_is_known_alone_and_in_our_domain_in_any_case(name: str) -> None:
    assert _said(name) == (dns.rcode.NOERROR, [HERE])


def test_names_may_hold_dots_and_underscores() -> None:
    assert _said("near.db_1") == (dns.rcode.NOERROR, [NEAR])


@pytest.mark.parametrize("kind", ["AAAA", "MX", "TXT", "HTTPS"])
def test_other_types_of_a_known_name_are_empty_not_absent(kind: str) -> None:
    assert _said("here", kind) == (dns.rcode.NOERROR, [])


def test_names_of_other_networks_are_absent_in_our_domain_and_asked_elsewhere_outside_it() -> None:
    assert _said("far.alveole") == (dns.rcode.NXDOMAIN, [])
    assert isinstance(_ask("far"), Forward)
    assert _said("far", source=FAR) == (dns.rcode.NOERROR, [FAR])


def test_addresses_have_names_in_their_own_network_only() -> None:
    assert _said(dns.reversename.from_address(NEAR).to_text(), "PTR") == (dns.rcode.NOERROR, ["near.db_1.alveole."])
    assert _said(dns.reversename.from_address(FAR).to_text(), "PTR") == (dns.rcode.NXDOMAIN, [])
    assert isinstance(_ask(dns.reversename.from_address("192.0.2.1").to_text(), "PTR"), Forward)


def test_an_internal_network_asks_nobody_else() -> None:
    assert _said("example.org", source=SHUT) == (dns.rcode.NXDOMAIN, [])


def test_strangers_are_refused() -> None:
    assert _said("here", source="10.80.99.99") == (dns.rcode.REFUSED, [])


def test_a_name_taken_over_by_another_instance_survives_the_end_of_the_first() -> None:
    zone = _zone()
    zone.add("10.80.16.9", Member("one", "here", internal=False))
    zone.remove(HERE)
    answer = zone.answer(dns.message.make_query("here", "A").to_wire(), NEAR)
    assert isinstance(answer, dns.message.Message)
    assert "10.80.16.9" in answer.to_text()
    zone.remove("10.80.16.9")
    assert isinstance(zone.answer(dns.message.make_query("here", "A").to_wire(), NEAR), Forward)


def test_answers_are_never_answered() -> None:
    """Else two servers could keep each other busy for ever."""
    query = dns.message.make_query("here", "A")
    query.flags |= dns.flags.QR
    assert _zone().answer(query.to_wire(), HERE) is None


def test_other_operations_are_not_implemented() -> None:
    update = dns.message.make_query("here", "A")
    update.set_opcode(dns.opcode.NOTIFY)
    answer = _zone().answer(update.to_wire(), HERE)
    assert isinstance(answer, dns.message.Message)
    assert answer.rcode() == dns.rcode.NOTIMP


@given(st.binary(max_size=600))
def test_any_bytes_are_survived(wire: bytes) -> None:
    _serialised(_zone().answer(wire, HERE))


@given(
    st.sampled_from(["here", "far.alveole", "2.16.80.10.in-addr.arpa", "example.org"]),
    st.sampled_from(["A", "AAAA", "PTR", "ANY", "AXFR", "OPT", "TSIG"]),
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=8),
    st.booleans(),
)
def test_damaged_questions_are_survived(name: str, kind: str, damage: list[tuple[int, int]], edns: bool) -> None:
    wire = bytearray(dns.message.make_query(name, kind, use_edns=edns).to_wire())
    for position, value in damage:
        wire[position % len(wire)] = value
    _serialised(_zone().answer(bytes(wire), HERE))


def _serialised(answer: dns.message.Message | Forward | None) -> None:
    """An answer that exists can also be sent, and a question that is passed on can be."""
    if isinstance(answer, Forward):
        answer.query.to_wire()
    elif answer is not None:
        answer.to_wire()
