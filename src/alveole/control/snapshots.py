"""Snapshots: made and removed by the agent of the instance's node, as tasks; instances go back to them and begin from
them.
"""

from typing import Any

from alveole.control import forks, instances, keys, volumes
from alveole.control.cache import Entry
from alveole.control.commit import (
    Context,
    Idempotency,
    Plan,
    absent,
    commit_operation,
    find,
    new_operation,
    put,
    unchanged,
)
from alveole.control.query import resolve_instance
from alveole.model.error import AlveoleError, ErrorCode, conflict, invalid
from alveole.model.instance import Desired, Instance, Mount, Origin, Phase
from alveole.model.operation import Operation
from alveole.model.snapshot import Snapshot
from alveole.model.volume import Volume
from alveole.policy.admission import check_spec

TASK_DEADLINE_S = 3600.0
_HAS_FILES = frozenset({Phase.RUNNING, Phase.EXITED, Phase.BACKOFF, Phase.FAILED})


async def create(
    context: Context,
    project: str,
    ref: str,
    *,
    name: str | None,
    memory: bool,
    scheduled: bool = False,
    idempotency: Idempotency | None = None,
) -> Operation:
    """Keep what an instance is now: its files and volumes, and with ``memory`` its memory and processes too."""
    context.space.require()
    return await commit_operation(
        context,
        project,
        idempotency,
        lambda: _plan_create(context, project, ref, name=name, memory=memory, scheduled=scheduled),
    )


def require_memory(context: Context, instance: Instance) -> None:
    """Raises CONFLICT unless its memory can be kept now."""
    forks.require_capturable(context, instance, "kept with its memory", volumes=True)


def _plan_create(
    context: Context, project: str, ref: str, *, name: str | None, memory: bool, scheduled: bool
) -> Plan[Operation]:
    instance: Instance = resolve_instance(context.cache, project, ref).record
    if memory:
        require_memory(context, instance)
    if instance.status.phase not in _HAS_FILES or instance.placement is None or instance.image is None:
        hint = f"alveole wake {instance.name}" if instance.status.phase is Phase.ASLEEP else "start it first"
        raise conflict(
            f"instance {instance.name} is {instance.status.phase}: there is nothing to keep of it", hint=hint
        )
    name = name or _free_name(context, instance)
    key = keys.snapshot(project, name)
    if context.cache.get(key) is not None:
        raise AlveoleError(ErrorCode.EXISTS, f"a snapshot named {name} exists", field="name")
    try:
        snapshot = Snapshot(
            id=context.ids.hex(12),
            project=project,
            name=name,
            instance=instance.name,
            instance_id=instance.id,
            spec=instance.spec,
            image=instance.image,
            node=instance.placement.node,
            memory=memory,
            scheduled=scheduled,
            volumes=_volumes_of(context, instance),
            phase="creating",
            created_at=context.clock.now(),
        )
    except ValueError as error:
        raise invalid(
            f"{name!r} is not a name", hint="lower-case letters, digits, . _ - and at most 63 characters", field="name"
        ) from error
    return _plan_task(context, "snapshot.create", snapshot, absent(key))


def _free_name(context: Context, instance: Instance) -> str:
    """With the time in it; of several in one second all but the first have something random too."""
    name = f"{instance.name[:40]}-{context.clock.now():%Y%m%d-%H%M%S}"
    taken = context.cache.get(keys.snapshot(instance.project, name)) is not None
    return f"{name}-{context.ids.hex(4)}" if taken else name


def _volumes_of(context: Context, instance: Instance) -> tuple[Volume, ...]:
    names = dict.fromkeys(mount.source for mount in instance.spec.mounts if mount.kind == "volume")
    found = (context.cache.get(keys.volume(instance.project, name)) for name in names)
    return tuple(entry.record for entry in found if entry is not None)


def _plan_task(context: Context, verb: str, snapshot: Snapshot, compare: Any) -> Plan[Operation]:
    operation = new_operation(
        context,
        snapshot.project,
        verb,
        f"snapshot/{snapshot.name}",
        node=snapshot.node,
        params={"snapshot": snapshot.model_dump(mode="json")},
        result={"id": snapshot.id, "name": snapshot.name},
        deadline_s=TASK_DEADLINE_S,
    )
    stored = put(keys.snapshot(snapshot.project, snapshot.name), snapshot.replace(operation=operation.id))
    return Plan(operation, (compare,), (stored, put(keys.operation(snapshot.project, operation.id), operation)))


async def remove(context: Context, project: str, name: str, idempotency: Idempotency | None = None) -> Operation:
    """Raises CONFLICT while an instance has still to begin from it."""

    def plan() -> Plan[Operation]:
        entry = find(context, keys.snapshot(project, name), f"snapshot {name}")
        snapshot: Snapshot = entry.record
        if snapshot.operation:
            raise conflict(f"snapshot {name} is {snapshot.phase}")
        if waiting := _waiting_for(context, snapshot):
            raise conflict(f"instance {waiting} is about to begin from snapshot {name}", hint="wait until it runs")
        return _plan_task(context, "snapshot.rm", snapshot.replace(phase="removing"), unchanged(entry))

    return await commit_operation(context, project, idempotency, plan)


def _waiting_for(context: Context, snapshot: Snapshot) -> str:
    table = context.cache.table(keys.collection(snapshot.project, "instances"))
    for instance in (entry.record for entry in table):
        origin = instance.origin
        waits = instance.status.run < instance.run and instance.desired is not Desired.REMOVED
        if waits and origin is not None and origin.moment == snapshot.id:
            return str(instance.name)
    return ""


async def restore(
    context: Context, project: str, name: str, ref: str | None, idempotency: Idempotency | None = None
) -> Operation:
    """Let the instance be what it was: files and volumes, and memory if that was kept. What it is now is lost.

    Raises CONFLICT if it is not the one the snapshot was taken of.
    """

    def plan() -> Plan[Operation]:
        kept = find(context, keys.snapshot(project, name), f"snapshot {name}")
        snapshot = _ready(kept)
        entry = resolve_instance(context.cache, project, ref or snapshot.instance)
        instance: Instance = entry.record
        if instance.id != snapshot.instance_id:
            raise conflict(
                f"snapshot {name} is not of instance {instance.name}, but of one that is no more or has another name",
                hint=f"alveole snapshot fork {name} makes a new instance of it",
            )
        return instances.intend(
            context,
            entry,
            "instance.restore",
            desired=Desired.RUNNING,
            run=instance.run + 1,
            grace_s=0.0,
            renewal=instance.renewal + 1,
            origin=_origin(snapshot),
        )

    return await commit_operation(context, project, idempotency, plan)


def _ready(entry: Entry) -> Snapshot:
    snapshot: Snapshot = entry.record
    if snapshot.phase != "ready":
        raise conflict(f"snapshot {snapshot.name} is {snapshot.phase}")
    return snapshot


def _origin(snapshot: Snapshot) -> Origin:
    return Origin(
        instance=snapshot.instance,
        instance_id=snapshot.instance_id,
        node=snapshot.node,
        moment=snapshot.id,
        memory=snapshot.memory,
        snapshot=snapshot.name,
    )


async def fork(
    context: Context,
    project: str,
    name: str,
    *,
    new: str | None,
    network: str | None = None,
    idempotency: Idempotency | None = None,
) -> Operation:
    """A new instance that begins as what was kept, with volumes of its own in place of those that were.

    ``network``: instead of the one that it was on.
    """
    context.space.require()

    def plan() -> Plan[Operation]:
        entry = find(context, keys.snapshot(project, name), f"snapshot {name}")
        snapshot = _ready(entry)
        if snapshot.memory and snapshot.volumes:
            raise conflict(
                f"snapshot {name} is of an instance that ran with volumes: only that one can go on from it",
                hint=f"alveole snapshot restore {name}; or take one without --memory, which can be forked",
            )
        target = new or instances.free_name(context, project, snapshot.instance)
        renamed = {volume.name: f"{target}-{volume.name}" for volume in snapshot.volumes}
        spec = forks.forked_spec(snapshot.spec)
        mounts = tuple(_renamed(mount, renamed) for mount in spec.mounts)
        spec = spec.replace(mounts=mounts, network=network or spec.network)
        check_spec(spec)
        plan = forks.plan_new(
            context,
            project,
            target,
            spec=spec,
            image=snapshot.image,
            origin=_origin(snapshot),
        )
        made = [volumes.plan_from(context, volume, f"{target}-{volume.name}", snapshot) for volume in snapshot.volumes]
        return Plan(
            plan.result,
            (*plan.compare, *(compare for part in made for compare in part.compare)),
            (*plan.writes, *(write for part in made for write in part.writes)),
        )

    return await commit_operation(context, project, idempotency, plan)


def _renamed(mount: Mount, names: dict[str, str]) -> Mount:
    return mount.replace(source=names.get(mount.source, mount.source)) if mount.kind == "volume" else mount
