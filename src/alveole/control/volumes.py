"""Volumes: made and removed by the node's agent, as tasks."""

from alveole.control import keys
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
from alveole.control.query import task_node
from alveole.model.error import AlveoleError, ErrorCode, conflict, invalid
from alveole.model.operation import Operation
from alveole.model.snapshot import Snapshot
from alveole.model.volume import Volume

DEFAULT_SIZE_BYTES = 10 << 30
TASK_DEADLINE_S = 300.0


async def create(
    context: Context, project: str, name: str, size_bytes: int, idempotency: Idempotency | None = None
) -> Operation:
    context.space.require()

    def plan() -> Plan[Operation]:
        if context.cache.get(keys.volume(project, name)) is not None:
            raise AlveoleError(ErrorCode.EXISTS, f"a volume named {name} exists", field="name")
        return _plan_new(context, project, name, size_bytes)

    return await commit_operation(context, project, idempotency, plan)


def plan_ensure(context: Context, project: str, name: str) -> Plan[None]:
    """The volume an instance wants; made with the default size if there is none."""
    entry = context.cache.get(keys.volume(project, name))
    if entry is None:
        made = _plan_new(context, project, name, DEFAULT_SIZE_BYTES)
        return Plan(None, made.compare, made.writes)
    if entry.record.phase == "removing":
        raise conflict(f"volume {name} is being removed")
    # Written again as it is: a removal that has not seen this instance yet fails its comparison.
    return Plan(None, (unchanged(entry),), (put(entry.key, entry.record),))


def plan_from(context: Context, kept: Volume, name: str, snapshot: Snapshot) -> Plan[None]:
    """A new volume with what another held when a snapshot was taken."""
    if context.cache.get(keys.volume(kept.project, name)) is not None:
        raise AlveoleError(ErrorCode.EXISTS, f"a volume named {name} exists", hint="choose another name", field="name")
    source = {"snapshot_id": snapshot.id, "volume_id": kept.id}
    made = _plan_new(context, kept.project, name, kept.size_bytes, source)
    return Plan(None, made.compare, made.writes)


def _plan_new(
    context: Context, project: str, name: str, size_bytes: int, source: dict[str, str] | None = None
) -> Plan[Operation]:
    key = keys.volume(project, name)
    try:
        volume = Volume(
            id=context.ids.hex(12),
            project=project,
            name=name,
            size_bytes=size_bytes,
            phase="creating",
            created_at=context.clock.now(),
        )
    except ValueError as error:
        raise invalid(
            f"volume {name!r} of {size_bytes} bytes cannot be made",
            hint="names are lower-case; a volume has at least 16 MiB",
            field="name",
        ) from error
    operation = new_operation(
        context,
        project,
        "volume.create",
        f"volume/{name}",
        node=task_node(context.cache),
        params={"volume": volume.model_dump(mode="json"), **({"source": source} if source else {})},
        deadline_s=TASK_DEADLINE_S,
    )
    return Plan(
        operation,
        (absent(key),),
        (put(key, volume.replace(operation=operation.id)), put(keys.operation(project, operation.id), operation)),
    )


async def remove(context: Context, project: str, name: str, idempotency: Idempotency | None = None) -> Operation:
    """Raises CONFLICT while an instance, running or not, refers to it."""

    def plan() -> Plan[Operation]:
        entry = find(context, keys.volume(project, name), f"volume {name}")
        volume: Volume = entry.record
        if volume.operation:
            raise conflict(f"volume {name} is {volume.phase}")
        refuse_used(context, volume)
        operation = new_operation(
            context,
            project,
            "volume.rm",
            f"volume/{name}",
            node=task_node(context.cache),
            params={"id": volume.id},
            deadline_s=TASK_DEADLINE_S,
        )
        return Plan(
            operation,
            (unchanged(entry),),
            (
                put(entry.key, volume.replace(phase="removing", operation=operation.id)),
                put(keys.operation(project, operation.id), operation),
            ),
        )

    return await commit_operation(context, project, idempotency, plan)


def refuse_used(context: Context, volume: Volume) -> None:
    users = [
        entry.record.name
        for entry in context.cache.table(keys.collection(volume.project, "instances"))
        if any(m.kind == "volume" and m.source == volume.name for m in entry.record.spec.mounts)
    ]
    if users:
        raise conflict(f"volume {volume.name} is used by {', '.join(users[:5])}", hint="remove these instances first")
