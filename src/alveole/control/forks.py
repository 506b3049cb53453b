"""Forks: new instances that go on from what another is, or was, at one moment."""

from alveole.control import instances, keys
from alveole.control.commit import Context, Idempotency, Plan, absent, commit_operation, new_operation, put
from alveole.control.query import resolve_instance
from alveole.model.error import AlveoleError, ErrorCode, conflict, invalid
from alveole.model.image import ImageContent
from alveole.model.instance import Desired, Instance, InstanceSpec, Origin, Phase, Placement
from alveole.model.node import Node
from alveole.model.operation import Operation


async def fork(
    context: Context,
    project: str,
    ref: str,
    *,
    name: str | None,
    moment: str | None,
    paused: bool = False,
    new_inside_address: bool = False,
    idempotency: Idempotency | None = None,
) -> Operation:
    """Write a new instance beside a running one, which begins asleep if ``paused``.

    ``new_inside_address``: it sees its own address, whatever the original sees. The operation's result tells the
    moment, for more forks of it.
    """
    context.space.require()

    def plan() -> Plan[Operation]:
        source: Instance = resolve_instance(context.cache, project, ref).record
        spec = _spec_of_fork(source, new_inside_address=new_inside_address)
        return _plan(context, source, spec, name=name, moment=moment, paused=paused)

    return await commit_operation(context, project, idempotency, plan)


async def sleep(context: Context, project: str, ref: str, idempotency: Idempotency | None = None) -> Operation:
    """Put a running instance on disk, memory and processes included. Starting it lets it go on."""

    def plan() -> Plan[Operation]:
        entry = resolve_instance(context.cache, project, ref)
        instance: Instance = entry.record
        require_capturable(context, instance, "put to sleep", volumes=True)
        return instances.intend(context, entry, "instance.sleep", desired=Desired.ASLEEP, run=instance.run)

    return await commit_operation(context, project, idempotency, plan)


def _spec_of_fork(source: Instance, *, new_inside_address: bool) -> InstanceSpec:
    if source.is_system and (new_inside_address or source.spec.inside_address == "same"):
        raise conflict(
            f"{source.name} is a whole operating system, which nobody can tell another address while it runs",
            hint="leave out --new-inside-address; run it without --inside-address same",
        )
    spec = forked_spec(source.spec)
    return spec.replace(inside_address="same") if new_inside_address else spec


def _plan(
    context: Context, source: Instance, spec: InstanceSpec, *, name: str | None, moment: str | None, paused: bool
) -> Plan[Operation]:
    placement = require_capturable(context, source, "forked")
    moment = moment or context.ids.hex(12)
    origin = Origin(instance=source.name, instance_id=source.id, node=placement.node, moment=moment)
    return plan_new(
        context,
        source.project,
        name or instances.free_name(context, source.project, source.name),
        spec=spec,
        image=source.image,
        origin=origin,
        desired=Desired.ASLEEP if paused else Desired.RUNNING,
    )


def plan_new(
    context: Context,
    project: str,
    name: str,
    *,
    spec: InstanceSpec,
    image: ImageContent | None,
    origin: Origin,
    desired: Desired = Desired.RUNNING,
) -> Plan[Operation]:
    """A new instance that begins from ``origin``, on the node that has it; once its volumes are there, if any."""
    key = keys.instance(project, name)
    if context.cache.get(key) is not None:
        raise AlveoleError(
            ErrorCode.EXISTS, f"an instance named {name} exists", hint="choose another name", field="name"
        )
    identifier = context.ids.hex(12)
    result = {"id": identifier, "name": name, "moment": origin.moment}
    operation = new_operation(context, project, "instance.fork", f"instance/{name}", generation=1, result=result)
    needs = instances.network_needs(context, project, identifier, spec)
    has_volumes = any(mount.kind == "volume" for mount in spec.mounts)
    try:
        instance = Instance(
            id=identifier,
            project=project,
            name=name,
            spec=spec,
            image=image,
            created_at=operation.created_at,
            desired=desired,
            run=1,
            renewal=1 if origin.snapshot else 0,
            placement=None if has_volumes else Placement(node=origin.node, epoch=1),
            origin=origin,
            operation=operation.id,
            **needs.fields,
        )
    except ValueError as error:
        raise invalid(
            f"{name!r} is not a name", hint="lower-case letters, digits, . _ - and at most 63 characters", field="name"
        ) from error
    writes = (put(key, instance), put(keys.operation(project, operation.id), operation), *needs.writes)
    return Plan(operation, (absent(key), *needs.compare), writes)


def forked_spec(spec: InstanceSpec) -> InstanceSpec:
    """What a fork is: all that the original is, but what only one on a host can have."""
    return spec.replace(ports=(), hostname=None, attach=False)


def require_capturable(context: Context, source: Instance, what: str, *, volumes: bool = False) -> Placement:
    """Where it is. Raises CONFLICT saying why it cannot be, ``what`` being what was asked.

    ``volumes``: whether it may have volumes, as only it goes on from there and finds them as they were.
    """
    if source.placement is None or source.status.phase is not Phase.RUNNING:
        raise conflict(f"instance {source.name} is {source.status.phase}: only a running one can be {what}")
    isolation = source.spec.isolation
    nodes = {entry.record.name: entry.record for entry in context.cache.table(keys.NODES)}
    node: Node | None = nodes.get(source.placement.node)
    if node is None or isolation not in node.forks:
        raise conflict(
            f"a {isolation} cannot be {what} here: it shares its memory with nothing that could copy it",
            hint=f"choose --isolation {' or '.join(node.forks) if node and node.forks else 'vm'}, which can be {what}",
        )
    kept = {"tmpfs", "volume"} if volumes else {"tmpfs"}
    shared = next((mount.source for mount in source.spec.mounts if mount.kind not in kept), None)
    if shared is not None:
        lacking = "shared directories" if volumes else "volumes and shared directories"
        raise conflict(
            f"{source.name} has {shared} mounted, which is not part of what can be kept of it",
            hint=f"only an instance without {lacking} can be {what}",
        )
    return source.placement
