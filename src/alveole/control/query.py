"""Reading: from the cache, never from the store."""

import asyncio
from collections.abc import Callable
from typing import Any

from alveole.control import keys
from alveole.control.cache import Cache, Entry
from alveole.model.error import conflict, invalid, not_found, unavailable
from alveole.model.instance import Instance, Phase
from alveole.model.operation import Operation, OperationState
from alveole.policy.lifecycle import is_settled


def resolve_instance(cache: Cache, project: str, ref: str) -> Entry:
    """By name, id, or a unique prefix of either. Raises NOT_FOUND, or CONFLICT naming the candidates."""
    exact = cache.get(keys.instance(project, ref))
    if exact is not None:
        return exact
    entries = cache.table(keys.collection(project, "instances")) if ref else []
    found = [e for e in entries if e.record.name.startswith(ref) or e.record.id.startswith(ref)]
    if not found:
        raise not_found(f"instance {ref} does not exist", hint="alveole ls shows all")
    if len(found) > 1:
        names = ", ".join(e.record.name for e in found[:5])
        raise conflict(f"{ref!r} is not unique: {names}", hint="give more of the name or id")
    return found[0]


def _has_label(instance: Instance, wanted: str) -> bool:
    key, given, value = wanted.partition("=")
    return key in instance.spec.labels and (not given or instance.spec.labels[key] == value)


_FILTERS: dict[str, Callable[[Instance, str], bool]] = {
    "name": lambda instance, value: value in instance.name,
    "id": lambda instance, value: instance.id.startswith(value),
    "phase": lambda instance, value: instance.status.phase == value,
    "isolation": lambda instance, value: instance.spec.isolation == value,
    "image": lambda instance, value: value in instance.spec.image,
    "network": lambda instance, value: instance.spec.network == value,
    "health": lambda instance, value: instance.status.health == value,
    "label": _has_label,
}


def list_instances(cache: Cache, project: str, filters: list[str]) -> list[Instance]:
    """Instances by name that pass all filters ``key=value``. Raises INVALID for an unknown filter."""
    tests = []
    for text in filters:
        key, found, value = text.partition("=")
        if key not in _FILTERS or not found:
            raise invalid(
                f"{text!r} is not a filter", hint=f"one of {', '.join(_FILTERS)}, as key=value", field="filter"
            )
        tests.append((_FILTERS[key], value))
    instances: list[Instance] = [e.record for e in cache.table(keys.collection(project, "instances"))]
    return [i for i in instances if all(test(i, value) for test, value in tests)]


def task_node(cache: Cache) -> str:
    """The node that carries out tasks of no instance. Raises UNAVAILABLE while none is registered."""
    nodes = cache.table(keys.NODES)
    if not nodes:
        raise unavailable("no node is registered yet", hint="try again in a moment")
    return str(nodes[0].record.name)


async def wait_operation(cache: Cache, project: str, identifier: str, timeout_s: float) -> Operation:
    """The operation when it is finished, or as it stands when the time has passed. Raises NOT_FOUND."""
    key = keys.operation(project, identifier)
    with cache.subscribe(keys.collection(project, "operations")) as subscription:
        entry = cache.get(key)
        if entry is None:
            raise not_found(f"operation {identifier} does not exist", hint="alveole operation ls shows recent ones")
        operation: Operation = entry.record
        try:
            async with asyncio.timeout(timeout_s):
                updates = subscription.updates()
                while operation.state is OperationState.RUNNING:
                    update = await anext(updates)
                    if update.key == key and update.new is not None:
                        operation = update.new.record
        except TimeoutError:
            return operation
    return operation


async def wait_instance(cache: Cache, project: str, ref: str, timeout_s: float) -> dict[str, Any]:
    """How the instance ended: when it has and nothing will start it again, or ``finished: false`` after the time."""
    with cache.subscribe(keys.collection(project, "instances")) as subscription:
        entry = resolve_instance(cache, project, ref)
        instance: Instance = entry.record
        outcome = _outcome(instance)
        try:
            async with asyncio.timeout(timeout_s):
                updates = subscription.updates()
                while outcome is None:
                    update = await anext(updates)
                    if update.key != entry.key:
                        continue
                    instance = update.new.record if update.new else instance
                    outcome = _outcome(instance, removed=update.new is None)
        except TimeoutError:
            return {"finished": False}
    return outcome


def _outcome(instance: Instance, *, removed: bool = False) -> dict[str, Any] | None:
    status = instance.status
    never_started = status.phase is Phase.CREATED and instance.run == 0
    if not removed and not is_settled(instance, status) and not never_started:
        return None
    found = {"finished": True, "exit_code": status.exit_code, "reason": status.reason or None}
    error = dict(status.error) if status.error else None
    return {key: value for key, value in {**found, "error": error}.items() if value is not None}
