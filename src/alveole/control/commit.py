"""Read the cache, decide, write with compare-and-swap; again if something it read has changed meanwhile."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import IPv4Network
from typing import Any, Generic, TypeVar

from alveole.control import keys
from alveole.control.cache import Cache, Entry
from alveole.control.space import Plenty, Space
from alveole.model.base import Record
from alveole.model.clock import Clock, Ids
from alveole.model.error import AlveoleError, ErrorCode, conflict, not_found
from alveole.model.operation import Operation, OperationState
from alveole.store.base import Compare, Delete, Put, Store, Write

ATTEMPTS = 32
IDEMPOTENCY_TTL_S = 24 * 3600
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    """What every part of the control plane works with."""

    store: Store
    cache: Cache
    clock: Clock
    ids: Ids
    pool: IPv4Network  # addresses of all networks come from here
    space: Space = field(default_factory=Plenty)
    latest_addresses: dict[str, str] = field(default_factory=dict)  # network id -> the one given last
    retries: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class Plan(Generic[T]):
    """What to write, provided that what was read still holds."""

    result: T
    compare: tuple[Compare, ...] = ()
    writes: tuple[Write, ...] = ()


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's key and what it was first used for."""

    key: str
    request: Any  # JSON

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()


def unchanged(entry: Entry) -> Compare:
    return Compare(key=entry.key, target="mod_revision", value=entry.revision)


def absent(key: str) -> Compare:
    return Compare(key=key, target="create_revision", value=0)


def put(key: str, record: Record, lease: int = 0) -> Put:
    return Put(key=key, value=record.to_json(), lease=lease)


async def commit(context: Context, plan: Callable[[], Plan[T]]) -> T:
    """Carry out a plan. ``plan`` is called again when its comparisons failed, and may raise AlveoleError."""
    decided = plan()
    if await _carried_out(context, decided):
        return decided.result
    async with context.retries:  # one at a time: of many that want the same, each round would else let one through
        for _ in range(ATTEMPTS):
            decided = plan()
            if await _carried_out(context, decided):
                return decided.result
    raise conflict("the records involved keep changing", hint="try again")


async def _carried_out(context: Context, plan: Plan[T]) -> bool:
    """False if what was read has changed. The cache has caught up then, too."""
    if not plan.writes:
        return True
    outcome = await context.store.txn(plan.compare, plan.writes)
    await context.cache.reached(outcome.revision)
    return outcome.succeeded


async def commit_operation(
    context: Context, project: str, idempotency: Idempotency | None, plan: Callable[[], Plan[Operation]]
) -> Operation:
    """``commit`` for a user's action; a repeated idempotency key returns the first operation again."""
    if idempotency is None:
        return await commit(context, plan)
    key = keys.idempotency(project, idempotency.key)
    lease = 0

    def once() -> Plan[Operation]:
        known = context.cache.get(key)
        if known is not None:
            return Plan(_repeated(context, project, json.loads(known.record), idempotency))
        decided = plan()
        note = json.dumps({"operation": decided.result.id, "request": idempotency.fingerprint()})
        extra = Put(key=key, value=note.encode(), lease=lease)
        operation_put = put(keys.operation(project, decided.result.id), decided.result)
        writes = decided.writes or (operation_put,)
        return Plan(decided.result, (*decided.compare, absent(key)), (*writes, extra))

    if context.cache.get(key) is None:
        lease = (await context.store.grant_lease(IDEMPOTENCY_TTL_S)).id
    try:
        return await commit(context, once)
    except AlveoleError:
        await context.store.revoke_lease(lease)  # nothing was put under it
        raise


def _repeated(context: Context, project: str, note: dict[str, str], idempotency: Idempotency) -> Operation:
    if note["request"] != idempotency.fingerprint():
        raise conflict(
            f"idempotency key {idempotency.key!r} was used for another request", hint="use a new key for each request"
        )
    entry = context.cache.get(keys.operation(project, note["operation"]))
    if entry is None:
        raise AlveoleError(ErrorCode.GONE, "the operation of this idempotency key is no longer kept")
    operation: Operation = entry.record
    return operation


def new_operation(context: Context, project: str, verb: str, target: str, **fields: Any) -> Operation:
    """An operation that begins now. Its id sorts by time: 11 hex digits of milliseconds, 5 random ones."""
    now = context.clock.now()
    deadline_s = fields.pop("deadline_s", None)
    return Operation(
        id=f"{int(now.timestamp() * 1000):011x}{context.ids.hex(5)}",
        project=project,
        verb=verb,
        target=target,
        created_at=now,
        deadline_at=now + timedelta(seconds=deadline_s) if deadline_s else None,
        **fields,
    )


def finished(context: Context, operation: Operation, error: AlveoleError | None = None, **fields: Any) -> Operation:
    """The operation with its outcome."""
    state = OperationState.DONE
    if error is not None:
        state = OperationState.CANCELLED if error.code is ErrorCode.CANCELLED else OperationState.FAILED
        fields["error"] = error_map(error)
    return operation.replace(state=state, finished_at=context.clock.now(), progress="", **fields)


def error_map(error: AlveoleError) -> dict[str, str]:
    parts = {"code": error.code.value, "message": error.message, "hint": error.hint, "field": error.field}
    return {key: value for key, value in parts.items() if value}


def find(context: Context, key: str, what: str) -> Entry:
    """The entry, or AlveoleError(NOT_FOUND) naming ``what``."""
    entry = context.cache.get(key)
    if entry is None:
        raise not_found(f"{what} does not exist")
    return entry


def delete(key: str) -> Delete:
    return Delete(key=key)
