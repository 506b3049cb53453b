"""The network of a machine inside its namespace: a tap for its card, and the rewriting of its constant address.

A machine sees the same addresses on every node and in every clone; its namespace rewrites them, packet by packet and
without any state, to the instance's address and back. See docs/decisions/0013-network-of-machines.md.
"""

from pathlib import Path

from alveole.host import nft, sysctl
from alveole.host.netlink import (
    NETFILTER,
    Netlink,
    link_up,
    new_address,
    new_default_route,
    new_host_route,
    new_neighbour,
)
from alveole.host.netns import entered
from alveole.host.nft_rewrite import append
from alveole.host.tap import ensure_tap
from alveole.network.base import (
    CONTROL_ADDRESS,
    CONTROL_GATEWAY,
    GUEST_ADDRESS,
    GUEST_GATEWAY,
    GUEST_GATEWAY_MAC,
    GUEST_MAC,
    TAP,
    Attachment,
)
from alveole.network.machine_rules import icmp_rules, ruleset
from alveole.network.slots import HOST_MAC, INNER_DEVICE
from alveole.runtime.base import Card


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
        ensure_tap(card.device, attachment.ids_base)
        _load_rules(attachment, card, gateway)  # before anything can pass
        sysctl.write("net/ipv4/ip_forward", "1")
        sysctl.write(f"net/ipv4/conf/{card.device}/proxy_arp", "1")  # for guests that ask for their gateway
        sysctl.write(f"net/ipv4/neigh/{card.device}/proxy_delay", "0")
        with Netlink() as inside:
            _connect(inside, card, gateway)


def _load_rules(attachment: Attachment, card: Card, gateway: str) -> None:
    rules = nft.Library()
    try:
        rules.execute(ruleset(card, attachment.address, gateway))
    finally:
        rules.close()
    if card.has_route:
        with Netlink(NETFILTER) as netfilter:
            append(netfilter, icmp_rules(card, attachment.address, gateway))


def _connect(inside: Netlink, card: Card, gateway: str) -> None:
    tap = inside.index_of(card.device)
    inside.send([link_up(card.device, mac=card.gateway_mac), new_address(tap, card.control_gateway)])
    for address in (card.control_address, card.address):
        inside.send([new_neighbour(tap, address, card.mac), new_host_route(tap, address, card.control_gateway)])
    if card.has_route:
        eth0 = inside.index_of(INNER_DEVICE)
        inside.send([new_neighbour(eth0, gateway, HOST_MAC), new_default_route(eth0, gateway)])
