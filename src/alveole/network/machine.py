"""The network of a machine inside its namespace: a tap for its card, and the rewriting of its constant address.

A machine sees the same addresses on every node and in every clone; its namespace rewrites them, packet by packet and
without any state, to the instance's address and back. See docs/decisions/0013-network-of-machines.md.
"""

from ipaddress import IPv4Address
from pathlib import Path

from alveole.host import nft, sysctl
from alveole.host.netlink import Netlink, link_up, new_address, new_default_route, new_host_route, new_neighbour
from alveole.host.netns import entered
from alveole.host.tap import ensure_tap
from alveole.model.error import internal
from alveole.network.base import (
    CONTROL_ADDRESS,
    CONTROL_GATEWAY,
    GUEST_ADDRESS,
    GUEST_GATEWAY,
    GUEST_GATEWAY_MAC,
    GUEST_MAC,
    GUEST_PREFIX,
    TAP,
    Attachment,
)
from alveole.network.slots import HOST_MAC, INNER_DEVICE
from alveole.runtime.base import Card

_OWNER = 1  # of a range's ids: the one that the machine's process runs as
_LINK_LOCAL = "169.254.0.0/16"


def card_for(machine: str, address: str, gateway: str) -> Card:
    """``machine``: "constant", or "same" for a guest that must see its ``address``, if it has any, and ``gateway``."""
    same = machine == "same" and bool(address)
    return Card(
        device=TAP,
        mac=GUEST_MAC,
        address=address if same else GUEST_ADDRESS,
        gateway=gateway if same else GUEST_GATEWAY,
        gateway_mac=GUEST_GATEWAY_MAC,
        control_address=CONTROL_ADDRESS,
        control_gateway=CONTROL_GATEWAY,
        has_route=bool(address),
    )


def plug(attachment: Attachment, card: Card, gateway: str) -> None:
    """Give the instance's namespace its tap, routes and rules. Idempotent, also while a machine runs there. Blocks."""
    with entered(Path(attachment.network_namespace)):
        ensure_tap(card.device, attachment.ids_base + _OWNER)
        sysctl.write("net/ipv4/ip_forward", "1")
        sysctl.write(f"net/ipv4/conf/{card.device}/proxy_arp", "1")  # for guests that ask for their gateway
        sysctl.write(f"net/ipv4/neigh/{card.device}/proxy_delay", "0")
        rules = nft.Library()
        try:
            rules.execute(ruleset(card, attachment.address, gateway))  # before anything can pass
        finally:
            rules.close()
        with Netlink() as inside:
            _connect(inside, card, gateway)


def _connect(inside: Netlink, card: Card, gateway: str) -> None:
    tap = _index(inside, card.device)
    inside.send([link_up(card.device, mac=card.gateway_mac), new_address(tap, card.control_gateway)])
    for address in (card.control_address, card.address):
        inside.send([new_neighbour(tap, address, card.mac), new_host_route(tap, address, card.control_gateway)])
    if card.has_route:
        eth0 = _index(inside, INNER_DEVICE)
        inside.send([new_neighbour(eth0, gateway, HOST_MAC), new_default_route(eth0, gateway)])


def _index(connection: Netlink, name: str) -> int:
    index = connection.link_index(name)
    if index is None:
        raise internal(f"network device {name} of a machine is gone", hint="stop and start the instance")
    return index


def ruleset(card: Card, address: str, gateway: str) -> str:
    """All rules of a machine's namespace, replacing what is there in one transaction.

    ``address``: of the instance, empty if it has none; ``gateway``: of the node. Pure.
    """
    return f"{_from_guest(card)}{_namespace(card, address, gateway)}"


def _from_guest(card: Card) -> str:
    """Before all else: a guest speaks with its own addresses only, and cannot fill the host's neighbour table."""
    inside = IPv4Address(card.address)
    forwarded = f"ip saddr {inside} ip daddr != {_LINK_LOCAL} accept" if card.has_route else ""
    return f"""
add table netdev card
delete table netdev card
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


def _namespace(card: Card, address: str, gateway: str) -> str:
    """What may enter, leave and cross it. Nothing is tracked; nothing of its own leaves by the instance's device."""
    return f"""
add table ip machine
delete table ip machine
table ip machine {{
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
  {_forwarding(card, IPv4Address(address), IPv4Address(gateway)) if card.has_route else _NO_FORWARDING}
}}
"""


_NO_FORWARDING = """
  chain forward {
    type filter hook forward priority filter; policy drop;
  }
"""


def _forwarding(card: Card, address: IPv4Address, gateway: IPv4Address) -> str:
    """Between the card and the instance's device, which knows the outer address only."""
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
    ip saddr {gateway} ip saddr set {guest_gateway}
    ip daddr set {inside} accept
  }}
  chain outwards {{
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
"""
