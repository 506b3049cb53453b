"""The rule text: what it says for an instance, and that nothing of a user gets into it."""

import ipaddress
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.host.identity import Identity
from alveole.model.instance import Port
from alveole.network.base import Attachment
from alveole.network.machine import card_for
from alveole.network.machine_rules import ruleset as machine_ruleset
from alveole.network.rules import admit, expel, ruleset

IDENTITY = Identity(
    id="0123abcd",
    state=Path("/nowhere"),
    run=Path("/nowhere/run"),
    uid_base=1 << 28,
    pool=ipaddress.IPv4Network("10.80.0.0/16"),
)
PORTS = (
    Port(host_port=8080, instance_port=80),
    Port(host_address="127.0.0.1", host_port=53, instance_port=5, protocol="udp"),
)


def _attachment(number: int = 0, *, internal: bool = False, ports: tuple[Port, ...] = ()) -> Attachment:
    return Attachment(
        instance_id=f"id{number}",
        name="web } ; flush ruleset ; #",
        hostname="web\n",
        project="default",
        user_namespace="",
        network_namespace="/run/ns/0/net",
        ids_base=0,
        interface=f"av0123{number:x}",
        network_id="net",
        subnet="10.80.16.0/20",
        internal=internal,
        address=str(ipaddress.IPv4Address("10.80.16.2") + number),
        ports=ports,
    )


def _elements(text: str) -> list[str]:
    return re.findall(r"^add element inet \S+ (\S+ \{ .* \})$", text, re.MULTILINE)


def test_what_an_instance_adds() -> None:
    assert _elements(admit(IDENTITY, _attachment(internal=True, ports=PORTS))) == [
        'sources { "av01230" . 10.80.16.2 }',
        "networks { 10.80.16.0/20 . 10.80.16.0/20 }",
        "internal_networks { 10.80.16.0/20 }",
        "ports_anywhere { tcp . 8080 : 10.80.16.2 . 80 }",
        "ports_at { udp . 127.0.0.1 . 53 : 10.80.16.2 . 5 }",
    ]


def test_an_instance_without_device_adds_nothing() -> None:
    bare = _attachment().replace(interface="", address="", subnet="")
    assert admit(IDENTITY, bare) == expel(IDENTITY, bare, last_of_network=True) == ""


def test_a_network_leaves_with_its_last_instance() -> None:
    attachment = _attachment(internal=True, ports=PORTS)
    assert "networks" not in expel(IDENTITY, attachment, last_of_network=False)
    gone = expel(IDENTITY, attachment, last_of_network=True)
    assert sorted(_elements(gone)) == sorted(_elements(admit(IDENTITY, attachment)))
    assert gone.count("delete element") == gone.count("add element")


def test_the_number_of_rules_does_not_depend_on_the_number_of_instances() -> None:
    few, many = (
        ruleset(IDENTITY, [_attachment(n, ports=PORTS) for n in range(count)], deny_foreign=True) for count in (1, 99)
    )
    assert few.count("\n") == many.count("\n")


def test_every_element_of_every_instance_is_in_the_whole_ruleset() -> None:
    attachments = [_attachment(n, internal=True, ports=PORTS) for n in range(3)]
    text = ruleset(IDENTITY, attachments, deny_foreign=False)
    for attachment in attachments:
        for element in _elements(admit(IDENTITY, attachment)):
            assert element[element.index("{") + 2 : -2] in text


def test_foreign_forwarding_is_denied_only_on_demand() -> None:
    assert "chain foreign" in ruleset(IDENTITY, (), deny_foreign=True)
    assert "chain foreign" not in ruleset(IDENTITY, (), deny_foreign=False)


@given(st.text(max_size=40), st.sampled_from(["address", "subnet", "host_address"]))
def test_text_that_is_no_address_never_becomes_a_rule(text: str, place: str) -> None:
    """Names are not used at all; the rest must parse, and is written anew from what was parsed."""
    attachment = _attachment()
    if place == "host_address":
        attachment = attachment.replace(ports=(Port(host_address=text, host_port=1, instance_port=1),))
    else:
        attachment = attachment.replace(**{place: text})
    try:
        rules = admit(IDENTITY, attachment)
    except ValueError:
        return
    for line in rules.splitlines():
        assert re.fullmatch(r'add element inet \w+ \w+ \{ [a-z0-9./": ]+ \}', line)


def test_text_meant_as_rules_is_refused() -> None:
    with pytest.raises(ValueError, match="decimal digits"):
        admit(IDENTITY, _attachment().replace(address="10.80.16.2 } ; flush ruleset"))


@given(st.text(max_size=40), st.sampled_from(["constant", "same"]))
def test_text_that_is_no_address_never_becomes_a_rule_of_a_machine(text: str, machine: str) -> None:
    try:
        rules = machine_ruleset(card_for(machine, text, str(IDENTITY.pool[1])), text, str(IDENTITY.pool[1]))
    except ValueError:
        return
    assert text == "" or re.fullmatch(r"[0-9.]+", text)
    assert re.fullmatch(r'[\w\s{};:"=!&|(),./<>@-]+', rules)


def test_a_machine_without_address_forwards_nothing() -> None:
    rules = machine_ruleset(card_for("constant", "", str(IDENTITY.pool[1])), "", str(IDENTITY.pool[1]))
    assert "hook forward priority filter; policy drop;\n  }" in rules
    assert "hook prerouting" not in rules
