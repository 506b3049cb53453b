"""Volumes that come to a running instance and leave it."""

from alveole.control import instances, keys, volumes
from alveole.control.cache import Entry
from alveole.control.commit import Context, Idempotency, Plan, commit_operation, put
from alveole.control.query import resolve_instance
from alveole.model.error import conflict
from alveole.model.instance import Instance, Mount, Phase
from alveole.model.operation import Operation
from alveole.policy.admission import check_spec


async def attach(
    context: Context,
    project: str,
    ref: str,
    volume: str,
    *,
    target: str,
    read_only: bool,
    idempotency: Idempotency | None = None,
) -> Operation:
    """Mount a volume in a running instance, for good: it has it after a restart too."""

    def plan() -> Plan[Operation]:
        entry = _running(context, project, ref)
        held = entry.record.spec.mounts
        if any(mount.kind == "volume" and mount.source == volume for mount in held):
            raise conflict(f"instance {entry.record.name} has volume {volume} already")
        needed = volumes.plan_ensure(context, project, volume)
        changed = _plan(context, entry, "instance.attach", (*held, _mount(volume, target, read_only=read_only)))
        return Plan(changed.result, (*needed.compare, *changed.compare), (*needed.writes, *changed.writes))

    return await commit_operation(context, project, idempotency, plan)


async def detach(
    context: Context, project: str, ref: str, volume: str, *, idempotency: Idempotency | None = None
) -> Operation:
    """Unmount a volume from a running instance, for good. Refused while the instance uses it."""

    def plan() -> Plan[Operation]:
        entry = _running(context, project, ref)
        held = entry.record.spec.mounts
        kept = tuple(mount for mount in held if mount.kind != "volume" or mount.source != volume)
        if kept == held:
            raise conflict(f"instance {entry.record.name} does not have volume {volume}")
        return _plan(context, entry, "instance.detach", kept)

    return await commit_operation(context, project, idempotency, plan)


def _mount(volume: str, target: str, *, read_only: bool) -> Mount:
    return Mount.model_validate({"kind": "volume", "source": volume, "target": target, "read_only": read_only})


def _running(context: Context, project: str, ref: str) -> Entry:
    """Raises CONFLICT if it does not run, or its wall does not let disks come and go."""
    entry = resolve_instance(context.cache, project, ref)
    instance: Instance = entry.record
    if instance.placement is None or instance.status.phase is not Phase.RUNNING or instance.is_system:
        raise conflict(
            f"instance {instance.name} is {instance.status.phase}: only a running one, no whole system, takes volumes",
            hint="give it volumes when it is created (-v)",
        )
    nodes = {found.record.name: found.record for found in context.cache.table(keys.NODES)}
    node = nodes.get(instance.placement.node)
    if node is None or instance.spec.isolation not in node.plugs:
        raise conflict(
            f"a {instance.spec.isolation} cannot be given volumes while it runs",
            hint="give it volumes when it is created (-v), or choose --isolation vm",
        )
    return entry


def _plan(context: Context, entry: Entry, verb: str, mounts: tuple[Mount, ...]) -> Plan[Operation]:
    """What it had before is kept with the operation, to be put back if this fails."""
    instance: Instance = entry.record
    spec = instance.spec.replace(mounts=mounts)
    check_spec(spec)
    plan = instances.intend(context, entry, verb, desired=instance.desired, run=instance.run, spec=spec)
    before = [mount.model_dump(mode="json") for mount in instance.spec.mounts]
    operation = plan.result.replace(params={"mounts": before})
    record, _, *others = plan.writes
    stored = put(keys.operation(instance.project, operation.id), operation)
    return Plan(operation, plan.compare, (record, stored, *others))
