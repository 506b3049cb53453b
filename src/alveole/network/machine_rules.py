"""The packet rules of a machine's namespace, as text for nftables. Pure.

They are the only thing between a guest and the namespace that its own process lives in, and they keep no state: what
is true of one packet is true of it on whichever node, and after any restart.
"""

from ipaddress import IPv4Address

from alveole.host.netlink import Message
from alveole.host.nft_rewrite import ICMP_INNER_DESTINATION, ICMP_INNER_SOURCE, rewrite_icmp
from alveole.network.base import GUEST_PREFIX
from alveole.network.slots import INNER_DEVICE
from alveole.runtime.base import Card

_TABLE = "machine"
_LINK_LOCAL = "169.254.0.0/16"
_ICMP_ERRORS = "icmp type { destination-unreachable, time-exceeded, parameter-problem }"
_INNER_SOURCE, _INNER_DESTINATION = (
    f"{_ICMP_ERRORS} @th,{8 * offset},32" for offset in (ICMP_INNER_SOURCE, ICMP_INNER_DESTINATION)
)


def ruleset(card: Card, address: str, gateway: str) -> str:
    """All rules of a machine's namespace but ``icmp_rules``, replacing what is there in one transaction.

    Tables are flushed, not deleted: whoever had deleted one would wait 10 ms when it closes its socket.
    ``address``: of the instance, empty if it has none; ``gateway``: of the node.
    """
    crossing = _crossing(card, IPv4Address(address), IPv4Address(gateway)) if card.has_route else _NO_CROSSING
    return f"{_from_guest(card)}{_namespace(card, crossing)}"


def icmp_rules(card: Card, address: str, gateway: str) -> tuple[Message, ...]:
    """The rewriting of the packet that an ICMP error is about: it bears the addresses of its sender's side."""
    return (
        rewrite_icmp(_TABLE, "inner_source_inwards", ICMP_INNER_SOURCE, card.address),
        rewrite_icmp(_TABLE, "inner_gateway_inwards", ICMP_INNER_DESTINATION, card.gateway),
        rewrite_icmp(_TABLE, "inner_gateway_outwards", ICMP_INNER_SOURCE, gateway),
        rewrite_icmp(_TABLE, "inner_destination_outwards", ICMP_INNER_DESTINATION, address),
    )


def _from_guest(card: Card) -> str:
    """Before all else: a guest speaks with its own addresses only, and cannot fill the host's neighbour table."""
    inside = IPv4Address(card.address)
    forwarded = f"ip saddr {inside} ip daddr != {_LINK_LOCAL} accept" if card.has_route else ""
    return f"""
add table netdev card
flush table netdev card
table netdev card {{
  chain ingress {{
    type filter hook ingress device "{card.device}" priority 0; policy drop;
    ether saddr != {card.mac} drop
    arp htype 1 arp ptype ip arp saddr ip {{ 0.0.0.0, {inside}, {card.control_address} }} accept
    ip saddr {card.control_address} ip daddr {card.control_gateway} accept
    {forwarded}
  }}
}}
"""


def _namespace(card: Card, crossing: str) -> str:
    """What may enter, leave and cross it. Nothing is tracked; nothing of its own leaves by the instance's device."""
    return f"""
add table ip {_TABLE}
flush table ip {_TABLE}
table ip {_TABLE} {{
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    iifname "{card.device}" ip daddr {card.control_gateway} tcp sport 22 tcp flags & (syn | ack) != syn accept \
comment "answers of the guest"
  }}
  chain output {{
    type filter hook output priority raw; policy drop;
    notrack
    oifname {{ "lo", "{card.device}" }} accept
  }}
{crossing}
}}
"""


_NO_CROSSING = """
  chain forward {
    type filter hook forward priority filter; policy drop;
  }
"""


def _crossing(card: Card, address: IPv4Address, gateway: IPv4Address) -> str:
    """Between the card, which knows the inside addresses, and the instance's device, which knows the outer ones."""
    inside, guest_gateway = IPv4Address(card.address), IPv4Address(card.gateway)
    return f"""
  chain prerouting {{
    type filter hook prerouting priority raw; policy drop;
    notrack
    iifname "lo" accept
    iifname "{INNER_DEVICE}" ip daddr {address} goto inwards
    iifname "{card.device}" goto outwards
  }}
  chain inwards {{
    ip saddr {{ {_LINK_LOCAL}, {GUEST_PREFIX} }} drop
    {_INNER_SOURCE} {int(address):#x} jump inner_source_inwards
    {_INNER_DESTINATION} {int(gateway):#x} jump inner_gateway_inwards
    ip saddr {gateway} ip saddr set {guest_gateway}
    ip daddr set {inside} accept
  }}
  chain outwards {{
    ip daddr {card.control_gateway} accept
    {_INNER_SOURCE} {int(guest_gateway):#x} jump inner_gateway_outwards
    {_INNER_DESTINATION} {int(inside):#x} jump inner_destination_outwards
    ip daddr {guest_gateway} ip daddr set {gateway} accept
    ip daddr {GUEST_PREFIX} drop
    accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{INNER_DEVICE}" oifname "{card.device}" ip daddr {inside} accept
    iifname "{card.device}" oifname "{INNER_DEVICE}" accept
  }}
  chain postrouting {{
    type filter hook postrouting priority raw; policy accept;
    oifname "{INNER_DEVICE}" ip saddr set {address}
  }}
  chain inner_source_inwards {{ }}
  chain inner_gateway_inwards {{ }}
  chain inner_gateway_outwards {{ }}
  chain inner_destination_outwards {{ }}
"""
