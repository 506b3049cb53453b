"""Networks and the addresses on them."""

from functools import partial
from ipaddress import IPv4Network

from alveole.control import keys
from alveole.control.cache import Cache
from alveole.control.commit import (
    Context,
    Idempotency,
    Plan,
    absent,
    commit,
    commit_operation,
    find,
    finished,
    new_operation,
    put,
    unchanged,
)
from alveole.model.error import AlveoleError, ErrorCode, conflict, invalid, not_found
from alveole.model.network import Network
from alveole.model.operation import Operation
from alveole.policy.address import DEFAULT_NETWORK_PREFIX, NETWORK_PREFIX, check_subnet, choose_address, choose_subnet
from alveole.policy.admission import SHARED_NETWORKS
from alveole.store.base import Delete, Put, Write

DEFAULT = "default"


async def create(
    context: Context,
    project: str,
    name: str,
    subnet: str | None,
    *,
    internal: bool,
    idempotency: Idempotency | None = None,
) -> Operation:
    def plan() -> Plan[Operation]:
        if name in SHARED_NETWORKS or context.cache.get(keys.network(project, name)) is not None:
            raise AlveoleError(ErrorCode.EXISTS, f"a network named {name} exists", field="name")
        made = _plan_new(context, project, name, subnet, internal=internal)
        operation = new_operation(context, project, "network.create", f"network/{name}")
        done = finished(context, operation, result={"name": name, "subnet": made.result.subnet})
        return Plan(done, made.compare, (*made.writes, put(keys.operation(project, done.id), done)))

    return await commit_operation(context, project, idempotency, plan)


def plan_ensure(context: Context, project: str, name: str) -> Plan[Network]:
    """The network an instance wants; a project's default one is made when first used."""
    entry = context.cache.get(keys.network(project, name))
    if entry is not None:
        if entry.record.removing:
            raise conflict(f"network {name} is being removed")
        return Plan(entry.record, (unchanged(entry),))
    if name != DEFAULT:
        raise not_found(f"network {name} does not exist", hint=f"alveole network create {name}")
    return _plan_new(context, project, name, None, internal=False)


def _plan_new(context: Context, project: str, name: str, wanted: str | None, *, internal: bool) -> Plan[Network]:
    used = [keys.subnet_of(name) for name in context.cache.names(keys.SUBNETS)]
    prefix = DEFAULT_NETWORK_PREFIX if name == DEFAULT else NETWORK_PREFIX
    chosen = check_subnet(context.pool, used, wanted) if wanted else choose_subnet(context.pool, used, prefix)
    try:
        network = Network(
            id=context.ids.hex(8),
            project=project,
            name=name,
            subnet=str(chosen),
            internal=internal,
            created_at=context.clock.now(),
        )
    except ValueError as error:
        raise invalid(f"{name!r} is not a name for a network of project {project!r}", field="name") from error
    key, subnet_key = keys.network(project, name), keys.subnet(network.subnet)
    return Plan(
        network,
        (absent(key), absent(subnet_key)),
        (put(key, network), Put(key=subnet_key, value=network.id.encode())),
    )


def free_address(context: Context, network: Network) -> str:
    """A free address, not one that was given back a moment ago."""
    latest = context.latest_addresses.get(network.id, "")
    address = choose_address(IPv4Network(network.subnet), _TakenAddresses(context.cache), latest)
    context.latest_addresses[network.id] = address
    return address


class _TakenAddresses:
    """Looked up one by one: a network may hold thousands."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __contains__(self, address: object) -> bool:
        return self._cache.get(keys.address(str(address))) is not None


async def remove(context: Context, project: str, name: str, idempotency: Idempotency | None = None) -> Operation:
    """Raises CONFLICT while instances are on it.

    In two commits: the first marks it, so that an instance being created at this moment fails its comparison;
    the second, certain now of who uses it, removes it or takes the mark back.
    """

    def mark() -> Plan[None]:
        entry = find(context, keys.network(project, name), f"network {name}")
        _refuse_used(context, entry.record)
        return Plan(None, (unchanged(entry),), (put(entry.key, entry.record.replace(removing=True)),))

    if idempotency is None or context.cache.get(keys.idempotency(project, idempotency.key)) is None:
        await commit(context, mark)
    return await commit_operation(context, project, idempotency, lambda: _plan_finish(context, project, name))


def _plan_finish(context: Context, project: str, name: str) -> Plan[Operation]:
    entry = find(context, keys.network(project, name), f"network {name}")
    operation = new_operation(context, project, "network.rm", f"network/{name}")
    try:
        _refuse_used(context, entry.record)
    except AlveoleError as error:
        failed = finished(context, operation, error)
        writes: tuple[Write, ...] = (put(entry.key, entry.record.replace(removing=False)),)
        return Plan(failed, (unchanged(entry),), (*writes, put(keys.operation(project, failed.id), failed)))
    done = finished(context, operation)
    return Plan(
        done,
        (unchanged(entry),),
        (
            Delete(key=entry.key),
            Delete(key=keys.subnet(entry.record.subnet)),
            put(keys.operation(project, done.id), done),
        ),
    )


def _refuse_used(context: Context, network: Network) -> None:
    instances = context.cache.table(keys.collection(network.project, "instances"))
    users = [e.record.name for e in instances if e.record.spec.network == network.name]
    if users:
        raise conflict(f"network {network.name} is used by {', '.join(users[:5])}", hint="remove these instances first")


async def finish_removals(context: Context) -> None:
    """Networks that were marked when the daemon died: decide again."""
    for entry in list(context.cache.everywhere("networks")):
        if entry.record.removing:
            network: Network = entry.record
            await commit_operation(
                context, network.project, None, partial(_plan_finish, context, network.project, network.name)
            )
