"""Which subnet a network and which address an instance gets. Pure."""

from collections.abc import Collection, Container
from ipaddress import IPv4Address, IPv4Network

from alveole.model.error import exhausted, invalid

DEFAULT_NETWORK_PREFIX = 19  # 8190 instances
NETWORK_PREFIX = 22  # 1022 instances
RESERVED_PREFIX = 22  # the pool's first block holds the gateway


def choose_subnet(pool: IPv4Network, used: Collection[str], prefix: int) -> IPv4Network:
    """The lowest free block of the pool. Raises EXHAUSTED."""
    taken = [IPv4Network(subnet) for subnet in used]
    taken.append(IPv4Network((pool.network_address, RESERVED_PREFIX)))
    for candidate in pool.subnets(new_prefix=prefix):
        if not any(candidate.overlaps(other) for other in taken):
            return candidate
    raise exhausted(f"the address pool {pool} has no free /{prefix} for another network", hint="remove a network")


def check_subnet(pool: IPv4Network, used: Collection[str], wanted: str) -> IPv4Network:
    """The subnet a user asked for. Raises INVALID if it is not free or not ours to give."""
    try:
        subnet = IPv4Network(wanted)
    except ValueError as error:
        raise invalid(f"{wanted!r} is not an IPv4 subnet: {error}", field="subnet") from error
    reserved = IPv4Network((pool.network_address, RESERVED_PREFIX))
    if not subnet.subnet_of(pool) or subnet.overlaps(reserved) or subnet.prefixlen > 30:
        raise invalid(
            f"subnet {subnet} is outside the usable part of this host's address pool",
            hint=f"choose a prefix from /{pool.prefixlen + 1} to /30 inside {pool}, but not in {reserved}",
            field="subnet",
        )
    for other in used:
        if subnet.overlaps(IPv4Network(other)):
            raise invalid(f"subnet {subnet} overlaps {other} of another network", field="subnet")
    return subnet


def choose_address(subnet: IPv4Network, used: Container[str], after: str = "") -> str:
    """A free host address of the subnet: the next one above ``after``, so that addresses are not reused at once.

    Raises EXHAUSTED.
    """
    first, count = int(subnet.network_address) + 1, subnet.num_addresses - 2
    start = int(IPv4Address(after)) + 1 - first if after else 0
    for offset in range(count):
        address = str(IPv4Address(first + (start + offset) % count))
        if address not in used:
            return address
    raise exhausted(f"network {subnet} has no free address", hint="remove instances, or make a larger network")
