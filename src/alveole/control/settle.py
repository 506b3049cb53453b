"""What becomes of the records involved when an operation ends, whoever ends it: agent, user or deadline."""

from collections.abc import Mapping
from typing import Any

from alveole.control import keys
from alveole.control.cache import Entry
from alveole.control.commit import Context, Plan, absent, finished, put, unchanged
from alveole.model.error import AlveoleError
from alveole.model.image import Image
from alveole.model.instance import Instance
from alveole.model.operation import Operation, Step
from alveole.model.reference import normalise
from alveole.store.base import Compare, Delete, Write

_FETCHES = frozenset({"image.pull", "image.import", "image.build"})
Parts = tuple[tuple[Compare, ...], tuple[Write, ...]]
NOTHING: Parts = ((), ())


def plan_task_end(
    context: Context,
    entry: Entry,
    result: Mapping[str, Any] | None,
    error: AlveoleError | None,
    steps: tuple[Step, ...] = (),
) -> Plan[None]:
    """The operation finished, and its image or volume as it now is, in one commit."""
    operation: Operation = entry.record
    kind, _, name = operation.target.partition("/")
    parts = NOTHING
    shown = dict(operation.result)
    if operation.verb in _FETCHES:
        parts = _settle_image(context, operation, name, result, error)
        if result is not None:
            shown["digest"] = result["content"]["digest"]
    elif kind == "volume":
        parts = _settle_made(context, operation, keys.volume(operation.project, name), error)
    elif kind == "snapshot":
        parts = _settle_made(context, operation, keys.snapshot(operation.project, name), error)
        shown.update(result or {})
    elif result is not None:
        shown.update(result)
    done = finished(context, operation, error, result=shown, steps=steps or operation.steps)
    return Plan(None, (unchanged(entry), *parts[0]), (put(entry.key, done), *parts[1]))


def _settle_image(
    context: Context, operation: Operation, name: str, result: Mapping[str, Any] | None, error: AlveoleError | None
) -> Parts:
    key = keys.image(operation.project, normalise(name))
    entry = context.cache.get(key)
    if error is None and result is not None:
        image = Image(
            project=operation.project,
            name=normalise(name),
            content=result["content"],
            source=operation.verb,
            created_at=context.clock.now(),
        )
        return ((unchanged(entry),) if entry else (absent(key),)), (put(key, image),)
    if entry is not None and entry.record.phase == "pulling" and entry.record.operation == operation.id:
        return (unchanged(entry),), (Delete(key=key),)
    return NOTHING


def _settle_made(context: Context, operation: Operation, key: str, error: AlveoleError | None) -> Parts:
    """The volume or snapshot ready, or gone."""
    entry = context.cache.get(key)
    if entry is None or entry.record.operation != operation.id:
        return NOTHING
    action = operation.verb.partition(".")[2]
    if action == "rm" and error is not None:  # its files may be gone: it can only be removed again
        return (unchanged(entry),), (put(entry.key, entry.record.replace(operation="")),)
    if action == "create" and error is None:
        return (unchanged(entry),), (put(entry.key, entry.record.replace(phase="ready", operation="")),)
    return (unchanged(entry),), (Delete(key=entry.key),)


def delete_instance(context: Context, entry: Entry) -> Parts:
    """The record gone and its address free."""
    instance: Instance = entry.record
    writes: list[Write] = [Delete(key=entry.key)]
    if instance.address:
        writes.append(Delete(key=keys.address(instance.address)))
    return (unchanged(entry),), tuple(writes)


def end_operation(
    context: Context, instance: Instance, error: AlveoleError | None, steps: tuple[Step, ...] = ()
) -> Parts:
    """The operation under way on the instance, if any, finished."""
    entry = running_operation(context, instance)
    if entry is None:
        return NOTHING
    done = finished(context, entry.record, error, steps=steps or entry.record.steps)
    return (unchanged(entry),), (put(entry.key, done),)


def running_operation(context: Context, instance: Instance) -> Entry | None:
    if not instance.operation:
        return None
    entry = context.cache.get(keys.operation(instance.project, instance.operation))
    return entry if entry is not None and entry.record.state == "running" else None
