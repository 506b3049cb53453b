"""What the handlers work with, and what they have in common."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from alveole.api.strict import query_number
from alveole.control import keys, query
from alveole.control.cache import Entry
from alveole.control.commit import Context, Idempotency
from alveole.control.events import token
from alveole.model.agent import NodeStreams
from alveole.model.base import Record
from alveole.model.error import invalid
from alveole.model.operation import Operation

MAX_WAIT_S = 3600.0
MAX_KEY_CHARACTERS = 64
_PROJECT = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")


class Nothing(Record):
    """No fields."""


@dataclass(frozen=True, slots=True)
class Service:
    context: Context
    streams: NodeStreams
    node: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One call of the API: where it is, what it does, and what OpenAPI says of it."""

    method: str
    path: str  # below /v1
    summary: str
    handler: Callable[[Service, Request], Awaitable[Response]]
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None  # of a single object, or of the items of a list
    listing: bool = False
    status: int = 200
    media_type: str = "application/json"
    query: tuple[tuple[str, str, str], ...] = ()  # name, JSON type, meaning


def project_of(request: HTTPConnection) -> str:
    project = request.query_params.get("project", "default")
    if not _PROJECT.fullmatch(project):
        raise invalid(
            f"{project[:80]!r} is not a project",
            hint="lower-case letters, digits, . _ - and at most 63 characters",
            field="project",
        )
    return project


def idempotency_of(request: Request, raw: Any) -> Idempotency | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY_CHARACTERS or not key.isprintable() or "/" in key:
        raise invalid(f"an idempotency key has 1 to {MAX_KEY_CHARACTERS} printable characters, without /")
    return Idempotency(key, [request.method, str(request.url.path), str(request.url.query), raw])


async def operation_response(service: Service, request: Request, operation: Operation) -> Response:
    """202 with the operation; with ``Prefer: wait=SECONDS`` as it is when finished or when the time has passed."""
    wait_s = preferred_wait_s(request)
    if wait_s is not None:
        operation = await query.wait_operation(service.context.cache, operation.project, operation.id, wait_s)
    return record_response(operation, status=202)


def preferred_wait_s(request: Request) -> float | None:
    """Of the Prefer header. Raises INVALID, so it is looked at before anything is done."""
    for preference in request.headers.get("prefer", "").split(","):
        name, _, value = preference.strip().partition("=")
        if name == "wait":
            if not _SECONDS.fullmatch(value):
                raise invalid(f"Prefer: wait={value!r} is not a number of seconds")
            return min(float(value), MAX_WAIT_S)
    return None


def record_response(record: Record, status: int = 200) -> Response:
    return Response(record.to_json(), status_code=status, media_type="application/json")


def list_response(service: Service, records: list[Any]) -> Response:
    items = b",".join(record.to_json() for record in records)
    revision = token(service.context.store, service.context.cache.revision)
    return Response(
        b'{"items":[' + items + b'],"revision":"' + revision.encode() + b'"}', media_type="application/json"
    )


def table(service: Service, request: Request, plural: str) -> list[Entry]:
    return service.context.cache.table(keys.collection(project_of(request), plural))


def timeout_of(request: Request) -> float:
    return query_number(request, "timeout_s", 30.0, MAX_WAIT_S)


def ok() -> Response:
    return JSONResponse({})
