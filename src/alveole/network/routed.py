"""The routed network of one node: no bridge, no shared broadcast domain, every packet through the host's rules.

Each instance has its own network namespace, a pair of devices to the host and one /32 address. See
docs/decisions/0005-routed-network.md.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from alveole.host import nft, sysctl
from alveole.host.blocking import in_thread
from alveole.host.identity import Identity
from alveole.host.netlink import (
    NETFILTER,
    Netlink,
    delete_dead_end,
    delete_link,
    forget_connections,
    link_up,
    new_address,
    new_bridge,
    new_dead_end,
    new_default_route,
    new_host_route,
    new_neighbour,
)
from alveole.host.netns import is_pinned, netlink_inside
from alveole.model.error import AlveoleError, internal
from alveole.model.instance import Port
from alveole.model.network import Network
from alveole.network import forwarding
from alveole.network.base import Attachment
from alveole.network.dns import DnsServer, Upstream, host_resolvers
from alveole.network.limits import limit
from alveole.network.machine import card_for, plug
from alveole.network.names import Member, Zone
from alveole.network.ports import HostPorts, checked_address
from alveole.network.relay import Relays
from alveole.network.rules import admit, expel, no_table, ruleset
from alveole.network.slots import HOST_MAC, INNER_DEVICE, INNER_MAC, Make, Slots, slot_of
from alveole.runtime.base import Ids

log = logging.getLogger(__name__)

_HOST_RESOLV_CONF = Path("/etc/resolv.conf")


class RoutedNetwork:
    """The network driver (see ``NetworkDriver``). ``recover`` is called once between ``open`` and the first ``attach``.

    ``pool_size``: slots made ahead. ``upstreams``: the resolvers asked for names that are not ours.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        pool_size: int = 4,
        upstreams: Callable[[], Sequence[Upstream]] = host_resolvers,
    ) -> None:
        self._identity = identity
        self._slots = Slots(identity, pool_size=pool_size)
        self._ports = HostPorts()
        self._relays = Relays()
        self._zone = Zone(identity.pool)
        self._dns = DnsServer(self._zone, upstreams=upstreams)
        self._library = nft.Library()
        self._attached: dict[str, Attachment] = {}
        self._admitted: set[str] = set()  # instances of which elements are in the rules
        self._rules = asyncio.Lock()  # rules change in the order in which it was decided how

    @property
    def gateway_device(self) -> str:
        """Holds the address that instances know as gateway and DNS server."""
        return f"{self._identity.interface_prefix}gw"

    async def open(self) -> None:
        """Raises AlveoleError(EXISTS) if a program of this host listens at port 53 on all addresses."""
        await self._slots.open()
        deny_foreign = await forwarding.ensure_decided(self._identity)
        if await nft.list_table(self._identity.table) is None:
            await nft.load(ruleset(self._identity, (), deny_foreign=deny_foreign))
        forwarding.ensure_on()
        await in_thread(self._ensure_gateway)
        await self._dns.open(self._identity.gateway)

    async def attach(
        self,
        *,
        instance_id: str,
        project: str,
        name: str,
        hostname: str,
        network: Network | None,
        mode: str,
        address: str,
        ports: tuple[Port, ...],
        ids: Ids | None,
        shifted: bool,
        machine: str = "",
        receive_bps: int | None = None,
        send_bps: int | None = None,
    ) -> Attachment:
        make = Make(user=shifted, network=mode != "host", device=mode == "network")
        if make.device and network is None:
            raise internal(f"instance {name} was placed without its network")
        if machine and not (make.user and make.network):
            raise internal(f"machine {name} was given no namespaces of its own")
        used = network if make.device else None
        wanted = Attachment(
            instance_id=instance_id,
            name=name,
            hostname=hostname,
            project=project,
            user_namespace="",
            network_namespace="",
            ids_base=0,
            interface="",
            network_id=used.id if used else "",
            subnet=used.subnet if used else "",
            internal=used.internal if used else False,
            address=address if used else "",
            ports=tuple(port.replace(host_address=checked_address(port)) for port in ports) if used else (),
            card=card_for(machine, address if used else "", self._identity.gateway) if machine else None,
            receive_bps=receive_bps if used else None,
            send_bps=send_bps if used else None,
        )
        known = self._attached.get(instance_id)
        if known and wanted == _without_slot(known):
            await self._connect(known)
            return known
        if known:
            await self.detach(known, keep_ids=known.ids_base != 0)
        try:
            return await self._attach(wanted, make, ids.base if ids and shifted else None)
        except OSError as error:
            raise internal(
                f"the network of instance {name} could not be made: {error}", hint="alveole doctor"
            ) from error

    async def detach(self, attachment: Attachment, *, keep_ids: bool) -> None:
        known = self._attached.get(attachment.instance_id)
        if known:
            await self._withdraw(known, keep_ids=keep_ids)
        elif attachment.ids_base and not keep_ids:
            self._slots.release_ids(attachment.ids_base)

    async def release_ids(self, ids: Ids) -> None:
        self._slots.release_ids(ids.base)

    async def recover(self, attachments: Collection[Attachment], reserved: Collection[Ids]) -> None:
        """Attachments whose namespaces or device are gone (the host was restarted) only keep their id range."""
        here = {a.instance_id: a for a in attachments if _is_intact(a)}
        gone = [a for a in attachments if a.instance_id not in here]
        bases = {ids.base for ids in reserved} | {a.ids_base for a in attachments}
        await self._slots.adopt(
            {number: a.instance_id for a in here.values() if (number := _slot(a)) is not None},
            {self._slots.number_of(base) for base in bases - {0}},
        )
        deny_foreign = await forwarding.ensure_decided(self._identity)
        async with self._rules:
            await nft.load(ruleset(self._identity, here.values(), deny_foreign=deny_foreign))
            self._attached, self._admitted = here, set(here)
        for attachment in here.values():
            await self._resume(attachment)
        for attachment in gone:
            await in_thread(partial(_forget_connections, attachment))
        self._slots.start_filling()  # not before: a slot that looked free may be that of an instance still running

    async def repair(self) -> None:
        if await nft.list_table(self._identity.table) is not None:
            return
        log.warning("our nftables rules were flushed by another program; loading them again")
        deny_foreign = await forwarding.ensure_decided(self._identity)
        async with self._rules:
            await nft.load(ruleset(self._identity, self._attached.values(), deny_foreign=deny_foreign))
            self._admitted = set(self._attached)

    def resolv_conf(self, attachment: Attachment) -> str:
        if attachment.interface:
            card = attachment.card
            return f"nameserver {card.gateway if card else self._identity.gateway}\noptions ndots:0\n"
        if attachment.network_namespace:
            return ""
        return _HOST_RESOLV_CONF.read_text() if _HOST_RESOLV_CONF.exists() else ""

    async def close(self, *, keep: bool) -> None:
        await self._relays.close_all()
        self._ports.close()
        await self._dns.close()
        if not keep:
            await nft.load(no_table(self._identity))
            await self._slots.remove_all()
            await in_thread(self._remove_gateway)
            await forwarding.release(self._identity)
        await self._slots.close()
        self._library.close()

    async def _attach(self, wanted: Attachment, make: Make, ids_base: int | None) -> Attachment:
        await self._ports.reserve(wanted.instance_id, wanted.name, wanted.ports)
        try:
            attachment = await self._with_slot(wanted, make, ids_base)
        except BaseException:
            self._ports.release(wanted.instance_id)
            raise
        self._attached[attachment.instance_id] = attachment
        try:
            await self._connect(attachment)
            await self._relays.open(attachment.instance_id, attachment.address, attachment.ports)
        except BaseException:
            await self._withdraw(attachment, keep_ids=ids_base is not None)
            raise
        self._register(attachment)
        return attachment

    async def _with_slot(self, wanted: Attachment, make: Make, ids_base: int | None) -> Attachment:
        if not make.user and not make.network:
            return wanted
        number = await self._slots.take(wanted.instance_id, make, ids_base)
        return wanted.replace(
            user_namespace=str(self._slots.user_pin(number)) if make.user else "",
            network_namespace=str(self._slots.network_pin(number)) if make.network else "",
            ids_base=self._slots.ids_base(number) if make.user else 0,
            interface=self._slots.device(number) if make.device else "",
        )

    async def _withdraw(self, attachment: Attachment, *, keep_ids: bool) -> None:
        """Undo an attach, whole or half done. If this fails or is cancelled, it can be called again."""
        self._zone.remove(attachment.address)
        await self._relays.close(attachment.instance_id)
        async with self._rules:
            self._admitted.discard(attachment.instance_id)
            last = all(self._attached[other].subnet != attachment.subnet for other in self._admitted)
            if text := expel(self._identity, attachment, last_of_network=last):
                await in_thread(partial(self._library.execute, text))
        self._ports.release(attachment.instance_id)
        number = _slot(attachment)
        if number is not None:
            await self._slots.free(number, keep_ids=keep_ids and attachment.ids_base != 0)
        await in_thread(partial(_forget_connections, attachment))
        self._attached.pop(attachment.instance_id, None)

    async def _connect(self, attachment: Attachment) -> None:
        """Give it its address and let its packets pass. Idempotent: a sandbox takes the address off its device."""
        if not attachment.interface:
            if attachment.card:
                await in_thread(partial(plug, attachment, attachment.card, self._identity.gateway))
            return
        async with self._rules:
            self._admitted.add(attachment.instance_id)
            await in_thread(partial(self._configure, attachment))

    def _configure(self, attachment: Attachment) -> None:
        if attachment.card:
            plug(attachment, attachment.card, self._identity.gateway)
        else:
            self._give_address(attachment)
        self._ensure_route(attachment)
        limit(attachment.interface, receive_bps=attachment.receive_bps, send_bps=attachment.send_bps)
        self._library.execute(admit(self._identity, attachment))

    def _give_address(self, attachment: Attachment) -> None:
        gateway = self._identity.gateway
        with netlink_inside(Path(attachment.network_namespace)) as inside:
            index = inside.index_of(INNER_DEVICE)
            inside.send(
                [
                    new_address(index, attachment.address),
                    new_neighbour(index, gateway, HOST_MAC),
                    new_default_route(index, gateway),
                ]
            )

    def _ensure_route(self, attachment: Attachment) -> None:
        with Netlink() as host:
            index = host.index_of(attachment.interface)
            route = new_host_route(index, attachment.address, self._identity.gateway)
            host.send([route, new_neighbour(index, attachment.address, INNER_MAC)])

    async def _resume(self, attachment: Attachment) -> None:
        """Take up what ended with the former daemon. What cannot be had any more is logged: the instance goes on."""
        try:
            if attachment.interface:
                await in_thread(partial(self._ensure_route, attachment))
            await self._ports.reserve(attachment.instance_id, attachment.name, attachment.ports)
            await self._relays.open(attachment.instance_id, attachment.address, attachment.ports)
        except (AlveoleError, OSError) as error:
            log.warning("instance %s was found again, but: %s", attachment.name, error)
        self._register(attachment)

    def _register(self, attachment: Attachment) -> None:
        if attachment.address:
            member = Member(attachment.network_id, attachment.name, attachment.internal)
            self._zone.add(attachment.address, member)

    def _ensure_gateway(self) -> None:
        name = self.gateway_device
        with Netlink() as host:
            host.send([new_bridge(name)], ignore=[errno.EEXIST])
            sysctl.write_if_present(f"net/ipv6/conf/{name}/disable_ipv6", "1")
            host.send([link_up(name), new_address(host.index_of(name), self._identity.gateway)])
            host.send([new_dead_end(str(self._identity.pool))])

    def _remove_gateway(self) -> None:
        with Netlink() as host:
            host.send([delete_link(self.gateway_device)], ignore=[errno.ENODEV])
            host.send([delete_dead_end(str(self._identity.pool))], ignore=[errno.ESRCH])


def _without_slot(attachment: Attachment) -> Attachment:
    return attachment.replace(user_namespace="", network_namespace="", ids_base=0, interface="")


def _slot(attachment: Attachment) -> int | None:
    """Its slot's number, from where its namespaces are pinned; None if it has none."""
    pin = attachment.network_namespace or attachment.user_namespace
    return slot_of(Path(pin)) if pin else None


def _is_intact(attachment: Attachment) -> bool:
    pins = [Path(pin) for pin in (attachment.user_namespace, attachment.network_namespace) if pin]
    devices = {name for _, name in socket.if_nameindex()}
    return all(is_pinned(pin) for pin in pins) and (not attachment.interface or attachment.interface in devices)


def _forget_connections(attachment: Attachment) -> None:
    """Nobody who gets the address later inherits the connections of this instance."""
    if attachment.address:
        with Netlink(NETFILTER) as connection:
            connection.send(forget_connections(attachment.address))
