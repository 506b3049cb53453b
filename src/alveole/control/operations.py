"""Operations: cancel, deadlines, and forgetting old ones."""

from datetime import timedelta
from functools import partial

from alveole.control import keys
from alveole.control.cache import Entry
from alveole.control.commit import Context, Plan, commit, find, finished, put, unchanged
from alveole.control.reports import undo_run
from alveole.control.settle import plan_task_end
from alveole.model.error import AlveoleError, ErrorCode, conflict
from alveole.model.instance import Desired, Instance
from alveole.model.operation import Operation, OperationState
from alveole.store.base import Delete, Write

KEPT = 1000
"""Finished operations kept for each project."""


async def cancel(context: Context, project: str, identifier: str) -> Operation:
    """Undo what is under way. Raises CONFLICT if it is finished or cannot be undone, as stop and all removals."""

    def plan() -> Plan[None]:
        entry = find(context, keys.operation(project, identifier), f"operation {identifier}")
        operation: Operation = entry.record
        if operation.state is not OperationState.RUNNING:
            raise conflict(f"operation {identifier} is already {operation.state}")
        error = AlveoleError(ErrorCode.CANCELLED, f"{operation.verb} was cancelled")
        if operation.verb in {"volume.rm", "snapshot.rm"}:
            raise conflict(f"{operation.verb} cannot be cancelled: its data may be gone already")
        if operation.node:
            return plan_task_end(context, entry, None, error)
        return _plan_cancel_instance(context, entry, error)

    await commit(context, plan)
    found: Operation = find(context, keys.operation(project, identifier), f"operation {identifier}").record
    return found


def _plan_cancel_instance(context: Context, entry: Entry, error: AlveoleError) -> Plan[None]:
    operation: Operation = entry.record
    done = put(entry.key, finished(context, operation, error))
    target = context.cache.get(keys.instance(operation.project, operation.target.partition("/")[2]))
    if target is None or target.record.operation != operation.id:
        return Plan(None, (unchanged(entry),), (done,))
    instance: Instance = target.record
    match operation.verb:
        case "instance.run" | "instance.fork" | "instance.create":
            changed = undo_run(instance)
        case "instance.start" | "instance.restart" | "instance.recreate" | "instance.restore":
            changed = instance.replace(desired=Desired.STOPPED, generation=instance.generation + 1, operation="")
        case _:
            raise conflict(f"{operation.verb} cannot be cancelled", hint="start the instance again when it is over")
    return Plan(None, (unchanged(entry), unchanged(target)), (done, put(target.key, changed)))


async def enforce_deadlines(context: Context) -> None:
    """End tasks whose deadline has passed."""
    now = context.clock.now()
    for entry in list(context.cache.everywhere("operations")):
        operation: Operation = entry.record
        late = operation.deadline_at is not None and operation.deadline_at <= now
        if late and operation.node and operation.state is OperationState.RUNNING:
            await commit(context, partial(_plan_timeout, context, entry.key))


def _plan_timeout(context: Context, key: str) -> Plan[None]:
    entry = context.cache.get(key)
    if entry is None or entry.record.state is not OperationState.RUNNING:
        return Plan(None)
    operation: Operation = entry.record
    allowed = (operation.deadline_at or operation.created_at) - operation.created_at
    error = AlveoleError(ErrorCode.TIMEOUT, f"{operation.verb} did not end within {allowed / timedelta(seconds=1):g} s")
    return plan_task_end(context, entry, None, error)


async def forget_old(context: Context) -> None:
    """Delete all but the latest finished operations of each project. Ids sort by time."""
    projects: dict[str, list[Entry]] = {}
    for entry in context.cache.everywhere("operations"):
        if entry.record.state is not OperationState.RUNNING:
            projects.setdefault(entry.record.project, []).append(entry)
    for entries in projects.values():
        old = sorted(entries, key=lambda e: e.key)[:-KEPT][:100]
        writes: tuple[Write, ...] = tuple(Delete(key=entry.key) for entry in old)
        if writes:
            await context.store.txn((), writes)
