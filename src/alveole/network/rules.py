"""The packet rules of one node, as text for nftables. Pure.

Default deny, in one table of ours. What differs between instances is in sets and maps, so that the number of rules, and
the cost of a packet, does not grow with them. Rules speak of our devices and addresses only; other traffic of the host
passes untouched.
"""

from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network

from alveole.host.identity import Identity
from alveole.network.base import Attachment

ANY_ADDRESS = "0.0.0.0"  # noqa: S104  (what a published port says by default)
FOREIGN_CHAIN = "foreign"
"""Present in a table that denies forwarding between devices of others, since Alveole switched forwarding on."""

_DNS_LIMIT = "1000/second burst 200 packets"
"""Of one instance: about a tenth of what the server can answer, and less at once than its socket holds."""
_EVERY_ALVEOLE = "av*"  # devices of all daemons on this host begin so


def ruleset(identity: Identity, attachments: Collection[Attachment], *, deny_foreign: bool) -> str:
    """The whole table with the elements of these attachments, replacing what is there in one transaction."""
    table = identity.table
    text = f"add table inet {table}\ndelete table inet {table}\n" + _table(identity, deny_foreign=deny_foreign)
    collected: dict[str, set[str]] = {}
    for attachment in attachments:
        for name, element in _elements(attachment):
            collected.setdefault(name, set()).add(element)
    return text + "".join(
        f"add element inet {table} {name} {{ {', '.join(sorted(elements))} }}\n" for name, elements in collected.items()
    )


def no_table(identity: Identity) -> str:
    """Remove the table, if it is there."""
    return f"add table inet {identity.table}\ndelete table inet {identity.table}\n"


def admit(identity: Identity, attachment: Attachment) -> str:
    """Let an instance in. Empty if it has no address."""
    return _commands("add", identity, _elements(attachment))


def expel(identity: Identity, attachment: Attachment, *, last_of_network: bool) -> str:
    """Take away what ``admit`` gave, whether or not it is there. Empty if it has no address."""
    gone = [(name, element) for name, element in _elements(attachment) if last_of_network or name not in _PER_NETWORK]
    # Deleting a missing element is an error and would undo the rest; one just added is never missing.
    return _commands("add", identity, gone) + _commands("delete", identity, gone)


_PER_NETWORK = {"networks", "internal_networks"}


def _elements(attachment: Attachment) -> Iterator[tuple[str, str]]:
    """Set or map, and element. Values go through their types, so that no text of a user reaches nftables."""
    if not attachment.interface:
        return
    address = IPv4Address(attachment.address)
    subnet = IPv4Network(attachment.subnet)
    yield "sources", f'"{attachment.interface}" . {address}'
    yield "networks", f"{subnet} . {subnet}"
    if attachment.internal:
        yield "internal_networks", str(subnet)
    for port in attachment.ports:
        target = f"{address} . {port.instance_port:d}"
        if port.host_address == ANY_ADDRESS:
            yield "ports_anywhere", f"{port.protocol} . {port.host_port:d} : {target}"
        else:
            yield "ports_at", f"{port.protocol} . {IPv4Address(port.host_address)} . {port.host_port:d} : {target}"


def _commands(verb: str, identity: Identity, elements: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{verb} element inet {identity.table} {name} {{ {element} }}\n" for name, element in elements)


def _table(identity: Identity, *, deny_foreign: bool) -> str:
    ours = f'"{identity.interface_prefix}*"'
    chains = _sources(ours) + _forwarding(ours) + _input(ours, identity.gateway) + _translation(ours, identity)
    return f"table inet {identity.table} {{{_SETS}{chains}{_FOREIGN if deny_foreign else ''}}}\n"


_SETS = """
  set sources { type ifname . ipv4_addr; }
  set networks { type ipv4_addr . ipv4_addr; flags interval; }
  set internal_networks { type ipv4_addr; flags interval; }
  set dns_askers { type ipv4_addr; size 65535; flags dynamic,timeout; timeout 1m; }
  map ports_at { type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service; }
  map ports_anywhere { type inet_proto . inet_service : ipv4_addr . inet_service; }
"""

_FOREIGN = f"""
  chain {FOREIGN_CHAIN} {{
    type filter hook forward priority filter; policy accept;
    iifname != "{_EVERY_ALVEOLE}" oifname != "{_EVERY_ALVEOLE}" drop
  }}
"""


def _sources(ours: str) -> str:
    """Before all else: an instance speaks with its own address only."""
    return f"""
  chain from_instance {{
    meta nfproto ipv6 drop
    iifname . ip saddr != @sources drop
    ip daddr 127.0.0.0/8 drop
  }}
  chain raw_prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifname {ours} jump from_instance
  }}
"""


def _forwarding(ours: str) -> str:
    """From and to instances, through the host."""
    return f"""
  chain forward_ours {{
    ct state invalid drop
    ct state established,related accept
    iifname {ours} oifname {ours} ip saddr . ip daddr @networks accept
    iifname {ours} ip saddr @internal_networks drop
    iifname {ours} ip daddr 169.254.0.0/16 drop comment "a cloud's metadata holds the host's credentials"
    oifname {ours} ct status dnat accept
    iifname {ours} oifname != {ours} accept
    drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname {ours} jump forward_ours
    oifname {ours} jump forward_ours
  }}
"""


def _input(ours: str, gateway: str) -> str:
    """From instances to the host itself: DNS and ping at the gateway address."""
    return f"""
  chain input_ours {{
    udp dport 53 update @dns_askers {{ ip saddr limit rate over {_DNS_LIMIT} }} drop
    ct state invalid drop
    ct state established,related accept
    ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept
    ip daddr {gateway} icmp type echo-request accept
    drop
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname {ours} jump input_ours
  }}
"""


def _translation(ours: str, identity: Identity) -> str:
    """Published ports on the way in, the host's address on the way out."""
    return f"""
  chain publish {{
    dnat ip to meta l4proto . ip daddr . th dport map @ports_at
    dnat ip to meta l4proto . th dport map @ports_anywhere
  }}
  chain nat_prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    meta l4proto {{ tcp, udp }} fib daddr type local jump publish
  }}
  chain nat_output {{
    type nat hook output priority -100; policy accept;
    meta l4proto {{ tcp, udp }} fib daddr type local jump publish
  }}
  chain nat_postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname {ours} ip saddr 127.0.0.0/8 snat ip to {identity.gateway} comment "from the host's loopback"
    oifname . ip saddr @sources snat ip to {identity.gateway} comment "an instance to its own published port"
    ip saddr {identity.pool} oifname != {ours} masquerade
  }}
"""
