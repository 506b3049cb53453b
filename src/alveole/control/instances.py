"""What users ask of instances: each request becomes one commit."""

from alveole.control import images, keys, networks, volumes
from alveole.control.cache import Entry
from alveole.control.commit import (
    Context,
    Idempotency,
    Plan,
    absent,
    commit_operation,
    finished,
    new_operation,
    put,
    unchanged,
)
from alveole.control.query import resolve_instance
from alveole.model.error import AlveoleError, ErrorCode, conflict, invalid
from alveole.model.instance import Desired, Instance, InstanceSpec, Origin, Phase
from alveole.model.operation import Operation, OperationState
from alveole.policy.admission import SHARED_NETWORKS, check_spec
from alveole.policy.lifecycle import is_settled
from alveole.store.base import Compare, Put, Write


async def create(
    context: Context,
    project: str,
    name: str | None,
    spec: InstanceSpec,
    *,
    start: bool,
    idempotency: Idempotency | None = None,
) -> Operation:
    """Write a new instance, with its address and what it needs that does not exist yet: image, volumes, network."""
    check_spec(spec)
    context.space.require()
    return await commit_operation(
        context, project, idempotency, lambda: _plan_create(context, project, name, spec, start=start)
    )


def _plan_create(
    context: Context, project: str, name: str | None, spec: InstanceSpec, *, start: bool
) -> Plan[Operation]:
    name = name or free_name(context, project, spec.image)
    key = keys.instance(project, name)
    if (taken := context.cache.get(key)) is not None:
        raise AlveoleError(
            ErrorCode.EXISTS,
            f"an instance named {name} exists ({taken.record.status.phase})",
            hint=f"choose another name, or remove it: alveole rm -f {name}",
            field="name",
        )
    identifier = context.ids.hex(12)
    operation = new_operation(
        context,
        project,
        "instance.run" if start else "instance.create",
        f"instance/{name}",
        generation=1,
        result={"id": identifier, "name": name},
    )
    needs = _needs(context, project, identifier, spec)
    try:
        instance = Instance(
            id=identifier,
            project=project,
            name=name,
            spec=spec,
            created_at=operation.created_at,
            desired=Desired.RUNNING if start else Desired.STOPPED,
            run=1 if start else 0,
            operation=operation.id,
            **needs.fields,
        )
    except ValueError as error:
        raise invalid(
            f"{name!r} is not a name", hint="lower-case letters, digits, . _ - and at most 63 characters", field="name"
        ) from error
    return Plan(
        operation,
        (absent(key), *needs.compare),
        (put(key, instance), put(keys.operation(project, operation.id), operation), *needs.writes),
    )


class Needs:
    """What a new instance needs: comparisons and writes to go with it, and fields of its record."""

    def __init__(self) -> None:
        self.compare: list[Compare] = []
        self.writes: list[Write] = []
        self.fields: dict[str, object] = {}

    def add(self, compare: tuple[Compare, ...], writes: tuple[Write, ...]) -> None:
        self.compare += compare
        self.writes += writes


def _needs(context: Context, project: str, identifier: str, spec: InstanceSpec) -> Needs:
    needs = Needs()
    image = images.plan_ensure(context, project, spec.image, spec.pull)
    needs.add(image.compare, image.writes)
    needs.fields.update(image.result)
    for name in {mount.source for mount in spec.mounts if mount.kind == "volume"}:
        volume = volumes.plan_ensure(context, project, name)
        needs.add(volume.compare, volume.writes)
    network = network_needs(context, project, identifier, spec)
    needs.add(tuple(network.compare), tuple(network.writes))
    needs.fields.update(network.fields)
    return needs


def network_needs(context: Context, project: str, identifier: str, spec: InstanceSpec) -> Needs:
    """Its network, and an address of it."""
    needs = Needs()
    if spec.network not in SHARED_NETWORKS:
        network = networks.plan_ensure(context, project, spec.network)
        needs.add(network.compare, network.writes)
        address = networks.free_address(context, network.result)
        needs.add((absent(keys.address(address)),), (Put(key=keys.address(address), value=identifier.encode()),))
        needs.fields["address"] = address
    return needs


def free_name(context: Context, project: str, image: str) -> str:
    """A name made of an image's or another instance's: ``nginx-3f2a``."""
    stem = (
        image.split("@", maxsplit=1)[0].rsplit("/", 1)[-1].split(":", maxsplit=1)[0].lower().strip("._-") or "instance"
    )
    while True:
        name = f"{stem[:40]}-{context.ids.hex(4)}"
        if context.cache.get(keys.instance(project, name)) is None:
            return name


async def start(context: Context, project: str, ref: str, idempotency: Idempotency | None = None) -> Operation:
    """Start one that is stopped or has ended; nothing happens to one that is running."""

    def plan() -> Plan[Operation]:
        entry = resolve_instance(context.cache, project, ref)
        instance: Instance = entry.record
        if instance.desired is Desired.RUNNING and not is_settled(instance, instance.status):
            operation = new_operation(context, project, "instance.start", f"instance/{instance.name}")
            return _already(context, operation)
        return intend(context, entry, "instance.start", desired=Desired.RUNNING, run=instance.run + 1)

    return await commit_operation(context, project, idempotency, plan)


async def stop(
    context: Context, project: str, ref: str, grace_s: float | None, idempotency: Idempotency | None = None
) -> Operation:
    """End its process: its stop signal, then SIGKILL after the grace. What is not running stays so."""

    def plan() -> Plan[Operation]:
        entry = resolve_instance(context.cache, project, ref)
        instance: Instance = entry.record
        return intend(context, entry, "instance.stop", desired=Desired.STOPPED, run=instance.run, grace_s=grace_s)

    return await commit_operation(context, project, idempotency, plan)


async def restart(
    context: Context, project: str, ref: str, grace_s: float | None, idempotency: Idempotency | None = None
) -> Operation:
    """Stop it if it runs, then start it."""

    def plan() -> Plan[Operation]:
        entry = resolve_instance(context.cache, project, ref)
        run = entry.record.run + 1
        return intend(context, entry, "instance.restart", desired=Desired.RUNNING, run=run, grace_s=grace_s)

    return await commit_operation(context, project, idempotency, plan)


async def recreate(context: Context, project: str, ref: str, idempotency: Idempotency | None = None) -> Operation:
    """End it without grace and begin anew from its image: files, memory and processes. Name, address, volumes stay."""

    def plan() -> Plan[Operation]:
        entry = resolve_instance(context.cache, project, ref)
        run, renewal = entry.record.run + 1, entry.record.renewal + 1
        verb = "instance.recreate"
        return intend(context, entry, verb, desired=Desired.RUNNING, run=run, grace_s=0.0, renewal=renewal)

    return await commit_operation(context, project, idempotency, plan)


async def remove(
    context: Context, project: str, ref: str, *, force: bool, idempotency: Idempotency | None = None
) -> Operation:
    """Remove it and its files. A running one only with ``force``, which gives no grace."""

    def plan() -> Plan[Operation]:
        entry = resolve_instance(context.cache, project, ref)
        instance: Instance = entry.record
        if not force and instance.status.phase in {Phase.RUNNING, Phase.BACKOFF, Phase.CREATING}:
            raise conflict(
                f"instance {instance.name} is {instance.status.phase}",
                hint=f"stop it first (alveole stop {instance.name}), or remove it by force: "
                f"alveole rm -f {instance.name}",
            )
        return intend(context, entry, "instance.rm", desired=Desired.REMOVED, run=instance.run, force=force)

    return await commit_operation(context, project, idempotency, plan)


def intend(
    context: Context,
    entry: Entry,
    verb: str,
    *,
    desired: Desired,
    run: int,
    grace_s: float | None = None,
    force: bool = False,
    renewal: int | None = None,
    origin: Origin | None = None,
    spec: InstanceSpec | None = None,
) -> Plan[Operation]:
    """Write what the user wants of an instance now. It supersedes an operation still under way on it.

    A new ``renewal`` lets it begin anew, from ``origin`` or else from its image.
    """
    instance: Instance = entry.record
    if instance.desired is Desired.REMOVED and not (desired is Desired.REMOVED and force and not instance.force):
        raise conflict(f"instance {instance.name} is being removed")
    operation = new_operation(
        context,
        instance.project,
        verb,
        f"instance/{instance.name}",
        generation=instance.generation + 1,
        result={"id": instance.id, "name": instance.name},
    )
    changed = instance.replace(
        desired=desired,
        run=run,
        generation=operation.generation,
        stop_grace_s=grace_s,
        force=force,
        renewal=instance.renewal if renewal is None else renewal,
        origin=instance.origin if renewal is None else origin,
        spec=spec or instance.spec,
        operation=operation.id,
    )
    return Plan(
        operation,
        (unchanged(entry),),
        (
            put(entry.key, changed),
            put(keys.operation(instance.project, operation.id), operation),
            *supersede(context, instance, verb),
        ),
    )


def supersede(context: Context, instance: Instance, verb: str) -> tuple[Write, ...]:
    """End the operation under way on the instance, if any, since another takes its place."""
    if not instance.operation:
        return ()
    entry = context.cache.get(keys.operation(instance.project, instance.operation))
    if entry is None or entry.record.state is not OperationState.RUNNING:
        return ()
    error = AlveoleError(ErrorCode.CANCELLED, f"superseded by {verb}")
    return (put(entry.key, finished(context, entry.record, error)),)


def _already(context: Context, operation: Operation) -> Plan[Operation]:
    done = finished(context, operation)
    return Plan(done, (), (put(keys.operation(operation.project, operation.id), done),))
