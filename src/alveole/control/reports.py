"""What agents report becomes records: status and the operation it ends go in one commit."""

from collections.abc import Mapping
from typing import Any

from alveole.control import keys
from alveole.control.commit import Context, Plan, put, unchanged
from alveole.control.settle import delete_instance, end_operation, plan_task_end, running_operation
from alveole.model.agent import InstanceReport, TaskReport
from alveole.model.error import AlveoleError, ErrorCode, conflict
from alveole.model.instance import Desired, Instance, Mount, Phase
from alveole.model.operation import OperationState
from alveole.policy.outcome import outcome


def plan_instance_report(context: Context, report: InstanceReport) -> Plan[None]:
    """Raises CONFLICT if the report is about an instance or epoch that is no longer this agent's.

    One that is older than what was reported already changes nothing.
    """
    entry = context.cache.get(keys.instance(report.project, report.name))
    if entry is None or entry.record.id != report.instance_id:
        raise conflict(f"instance {report.name} ({report.instance_id}) is no longer recorded")
    instance: Instance = entry.record
    if instance.placement is None or instance.placement.epoch != report.epoch:
        raise conflict(f"instance {report.name} was placed anew; the report's epoch {report.epoch} is stale")
    if report.status.observed_generation < instance.status.observed_generation:
        return Plan(None)
    if report.removed:
        compare, writes = delete_instance(context, entry)
        more_compare, more_writes = end_operation(context, instance, None, report.steps)
        return Plan(None, (*compare, *more_compare), (*writes, *more_writes))
    changed, error = instance.replace(status=report.status), None
    operation = running_operation(context, instance)
    result = outcome(operation.record, instance, report.status) if operation else "under way"
    if result == "failed":
        error = AlveoleError(ErrorCode.INTERNAL, "it failed")
        if report.status.error:
            error = read_error(report.status.error)
        if operation is not None and operation.record.verb in {"instance.run", "instance.fork"}:
            changed = undo_run(changed)
        elif operation is not None and operation.record.verb == "instance.sleep":
            changed = _stay_awake(changed)
        elif operation is not None and "mounts" in operation.record.params:
            mounts = tuple(map(Mount.model_validate, operation.record.params["mounts"]))
            changed = changed.replace(
                spec=changed.spec.replace(mounts=mounts), generation=changed.generation + 1, operation=""
            )
    if result == "under way":
        if operation is not None and report.steps and report.steps != operation.record.steps:
            progressed = operation.record.replace(steps=report.steps)
            return Plan(
                None,
                (unchanged(entry), unchanged(operation)),
                (put(entry.key, changed), put(operation.key, progressed)),
            )
        return Plan(None, (unchanged(entry),), (put(entry.key, changed),))
    compare, writes = end_operation(context, instance, error, report.steps)
    return Plan(None, (unchanged(entry), *compare), (put(entry.key, changed), *writes))


def undo_run(instance: Instance) -> Instance:
    """A run that failed to start leaves no instance behind."""
    return instance.replace(desired=Desired.REMOVED, force=True, generation=instance.generation + 1, operation="")


def _stay_awake(instance: Instance) -> Instance:
    """One that could not be put to sleep goes on as it was, if it has not ended by itself."""
    desired = Desired.RUNNING if instance.status.phase is Phase.RUNNING else Desired.STOPPED
    return instance.replace(desired=desired, generation=instance.generation + 1, operation="")


def plan_task_report(context: Context, report: TaskReport) -> Plan[None]:
    """Raises CANCELLED if the operation has ended meanwhile."""
    entry = context.cache.get(keys.operation(report.project, report.operation_id))
    if entry is None or entry.record.state is not OperationState.RUNNING:
        raise AlveoleError(ErrorCode.CANCELLED, f"operation {report.operation_id} is no longer under way")
    if not report.finished:
        progressed = entry.record.replace(progress=report.progress, steps=report.steps or entry.record.steps)
        return Plan(None, (unchanged(entry),), (put(entry.key, progressed),))
    error = read_error(report.error) if report.error else None
    return plan_task_end(context, entry, report.result, error, report.steps)


def read_error(data: Mapping[str, Any]) -> AlveoleError:
    """An error as it is stored and sent, read again."""
    return AlveoleError(
        ErrorCode(data["code"]), data["message"], hint=data.get("hint", ""), field=data.get("field", "")
    )
