"""The network driver's contract: namespaces, addresses, rules and names of one node's instances."""

from collections.abc import Collection
from typing import Protocol

from alveole.model.base import Record
from alveole.model.instance import Port
from alveole.model.network import Network
from alveole.runtime.base import Card, Ids

GUEST_PREFIX = "192.0.0.0/29"
"""Set apart for stateless translation (RFC 7335): no network has these addresses for anything else."""
GUEST_ADDRESS, GUEST_GATEWAY = "192.0.0.2", "192.0.0.1"
CONTROL_ADDRESS, CONTROL_GATEWAY = "169.254.0.2", "169.254.0.1"
GUEST_MAC, GUEST_GATEWAY_MAC = "02:00:00:00:00:04", "02:00:00:00:00:03"
TAP = "tap0"


class Attachment(Record):
    """What the network driver made for one instance: small, stored, enough to adopt it after a restart."""

    instance_id: str
    name: str  # of the instance, for DNS
    hostname: str
    project: str
    user_namespace: str  # path of a pinned namespace; empty when not asked for
    network_namespace: str  # path of a pinned namespace; empty: the host's
    ids_base: int  # first host id of its range; 0: not shifted
    interface: str  # the host's end of its veth; empty for host and none
    network_id: str
    subnet: str
    internal: bool
    address: str
    ports: tuple[Port, ...]
    card: Card | None = None  # of a machine, else None
    receive_bps: int | None = None  # most bytes a second; None: no limit was asked for
    send_bps: int | None = None


class NetworkDriver(Protocol):
    """Every method is idempotent. Rules change by atomic nft transactions."""

    async def open(self) -> None:
        """Make the node's table, device and DNS server. ``recover`` must follow before anything is attached."""
        ...

    async def attach(
        self,
        *,
        instance_id: str,
        project: str,
        name: str,
        hostname: str,
        network: Network | None,
        mode: str,  # network | host | none
        address: str,
        ports: tuple[Port, ...],
        ids: Ids | None,  # the range it already has from a former run; None: give it one
        shifted: bool,  # whether it wants a user namespace
        machine: str = "",  # constant | same: what its guest sees as its own address; empty: it is no machine
        receive_bps: int | None = None,  # most bytes a second; mode network only
        send_bps: int | None = None,
    ) -> Attachment:
        """Give the instance its namespaces, address, published ports and name.

        A machine gets a tap (``Attachment.card``) in its namespace, which the host's user ``ids_base`` may open.
        It must be ``shifted``, and cannot share the host's network.

        Called again for the same, it gives back an address that was taken off (a sandbox does so when it starts).
        Raises EXISTS when a host port is taken, naming the port; EXHAUSTED when no id range is left;
        UNSUPPORTED when this kernel cannot limit rates.
        """
        ...

    async def detach(self, attachment: Attachment, *, keep_ids: bool) -> None:
        """Take all of it away. ``keep_ids``: the id range stays reserved (its files carry it)."""
        ...

    async def release_ids(self, ids: Ids) -> None:
        """Free an id range that ``detach`` kept: no file carries it any more."""
        ...

    async def recover(self, attachments: Collection[Attachment], reserved: Collection[Ids]) -> None:
        """Adopt these, reserve these ranges, and remove every other object of this driver.

        Called once, after ``open`` and before the first ``attach``.
        """
        ...

    async def repair(self) -> None:
        """Put back what another program took away, such as rules that somebody flushed. Called every few seconds."""
        ...

    def resolv_conf(self, attachment: Attachment) -> str:
        """The contents of /etc/resolv.conf for it, as a guest sees it if it is a machine."""
        ...

    async def close(self, *, keep: bool) -> None:
        """Stop DNS, relays and pool. ``keep``: rules and device stay, since instances go on."""
        ...
