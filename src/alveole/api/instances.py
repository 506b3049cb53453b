"""Routes of instances."""

import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from alveole.api.errors import error_body
from alveole.api.service import (
    Nothing,
    Route,
    Service,
    idempotency_of,
    list_response,
    ok,
    operation_response,
    project_of,
    record_response,
    timeout_of,
)
from alveole.api.strict import query_flag, query_number, query_time, read_body
from alveole.control import forks, instances
from alveole.control.query import list_instances, resolve_instance, wait_instance
from alveole.control.schedules import set_schedule
from alveole.model.agent import Changes, InstanceStats, LogLine
from alveole.model.base import Record
from alveole.model.error import AlveoleError
from alveole.model.instance import Instance, InstanceSpec, Schedule
from alveole.model.operation import Operation
from alveole.policy.admission import signal_number

MAX_TAIL = 1_000_000


class CreateInstance(Record):
    """A new instance. Without a name it gets one made of its image's."""

    name: str | None = None
    start: bool = True
    spec: InstanceSpec


class ForkInstance(Record):
    """Without a name it gets one made of the original's. Forks with the same ``moment`` go on from the same."""

    name: str | None = None
    moment: str | None = Field(default=None, pattern="^[0-9a-f]{12}$")
    paused: bool = False  # it sleeps until it is started
    new_inside_address: bool = False  # of a vm: it sees its own address, and not the one that all see


class SetSchedule(Record):
    """Absent: none from now on."""

    schedule: Schedule | None = None


class Grace(Record):
    """How long the process may take to end before it is killed; absent: as its spec says."""

    grace_s: float | None = Field(default=None, ge=0, le=3600)


class Kill(Record):
    signal: str | int = "SIGKILL"


class WaitOutcome(Record):
    """``finished`` is false when the time passed first."""

    finished: bool
    exit_code: int | None = None
    reason: str | None = None
    error: dict[str, Any] | None = None


async def index(service: Service, request: Request) -> Response:
    filters = request.query_params.getlist("filter")
    return list_response(service, list_instances(service.context.cache, project_of(request), filters))


async def create(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, CreateInstance)
    operation = await instances.create(
        service.context,
        project_of(request),
        body.name,
        body.spec,
        start=body.start,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def show(service: Service, request: Request) -> Response:
    return record_response(_find(service, request))


async def remove(service: Service, request: Request) -> Response:
    operation = await instances.remove(
        service.context,
        project_of(request),
        request.path_params["ref"],
        force=query_flag(request, "force"),
        idempotency=idempotency_of(request, None),
    )
    return await operation_response(service, request, operation)


async def start(service: Service, request: Request) -> Response:
    _, raw = await read_body(request, Nothing)
    operation = await instances.start(
        service.context, project_of(request), request.path_params["ref"], idempotency_of(request, raw)
    )
    return await operation_response(service, request, operation)


async def stop(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, Grace)
    operation = await instances.stop(
        service.context, project_of(request), request.path_params["ref"], body.grace_s, idempotency_of(request, raw)
    )
    return await operation_response(service, request, operation)


async def restart(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, Grace)
    operation = await instances.restart(
        service.context, project_of(request), request.path_params["ref"], body.grace_s, idempotency_of(request, raw)
    )
    return await operation_response(service, request, operation)


async def recreate(service: Service, request: Request) -> Response:
    _, raw = await read_body(request, Nothing)
    operation = await instances.recreate(
        service.context, project_of(request), request.path_params["ref"], idempotency_of(request, raw)
    )
    return await operation_response(service, request, operation)


async def sleep(service: Service, request: Request) -> Response:
    _, raw = await read_body(request, Nothing)
    operation = await forks.sleep(
        service.context, project_of(request), request.path_params["ref"], idempotency_of(request, raw)
    )
    return await operation_response(service, request, operation)


async def fork(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, ForkInstance)
    operation = await forks.fork(
        service.context,
        project_of(request),
        request.path_params["ref"],
        name=body.name,
        moment=body.moment,
        paused=body.paused,
        new_inside_address=body.new_inside_address,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def kill(service: Service, request: Request) -> Response:
    body, _ = await read_body(request, Kill)
    await service.streams.signal(_find(service, request), signal_number(str(body.signal)))
    return ok()


async def wait(service: Service, request: Request) -> Response:
    outcome = await wait_instance(
        service.context.cache, project_of(request), request.path_params["ref"], timeout_of(request)
    )
    return JSONResponse(outcome)


async def logs(service: Service, request: Request) -> Response:
    tail = query_number(request, "tail", -1, MAX_TAIL) if "tail" in request.query_params else None
    lines = service.streams.logs(
        _find(service, request),
        follow=query_flag(request, "follow"),
        tail=None if tail is None else int(tail),
        since=query_time(request, "since"),
    )
    return StreamingResponse(_ndjson(lines), media_type="application/x-ndjson")


async def _ndjson(lines: AsyncIterator[LogLine]) -> AsyncIterator[bytes]:
    """The status has been sent when an error occurs: it is the last line then."""
    try:
        async for line in lines:
            yield line.to_json() + b"\n"
    except AlveoleError as error:
        yield json.dumps(error_body(error)).encode() + b"\n"


async def stats(service: Service, request: Request) -> Response:
    return record_response(await service.streams.stats(_find(service, request)))


async def schedule(service: Service, request: Request) -> Response:
    body, _ = await read_body(request, SetSchedule)
    ref = request.path_params["ref"]
    return record_response(await set_schedule(service.context, project_of(request), ref, body.schedule))


async def changes(service: Service, request: Request) -> Response:
    return record_response(await service.streams.changes(_find(service, request)))


def _find(service: Service, request: Request) -> Instance:
    found: Instance = resolve_instance(service.context.cache, project_of(request), request.path_params["ref"]).record
    return found


_ONE = "/instances/{ref}"
ROUTES = (
    Route(
        method="GET",
        path="/instances",
        summary="List instances",
        handler=index,
        answer=Instance,
        listing=True,
        query=(("filter", "string", "KEY=VALUE; repeatable, all must match"),),
    ),
    Route(
        method="POST",
        path="/instances",
        summary="Create an instance, and start it",
        handler=create,
        body=CreateInstance,
        answer=Operation,
        status=202,
    ),
    Route(method="GET", path=_ONE, summary="One instance, by name, id or unique prefix", handler=show, answer=Instance),
    Route(
        method="DELETE",
        path=_ONE,
        summary="Remove an instance and its files",
        handler=remove,
        answer=Operation,
        status=202,
        query=(("force", "boolean", "also a running one, without grace"),),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/start",
        summary="Start it",
        handler=start,
        body=Nothing,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST", path=f"{_ONE}/stop", summary="Stop it", handler=stop, body=Grace, answer=Operation, status=202
    ),
    Route(
        method="POST",
        path=f"{_ONE}/restart",
        summary="Stop it, then start it",
        handler=restart,
        body=Grace,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path=f"{_ONE}/recreate",
        summary="Begin anew from its image, keeping name, address and volumes",
        handler=recreate,
        body=Nothing,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path=f"{_ONE}/sleep",
        summary="Put it on disk, memory and processes included, until it is started",
        handler=sleep,
        body=Nothing,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path=f"{_ONE}/fork",
        summary="A new instance that goes on from what this one is now, memory included",
        handler=fork,
        body=ForkInstance,
        answer=Operation,
        status=202,
    ),
    Route(
        method="PUT",
        path=f"{_ONE}/schedule",
        summary="Take snapshots of it by themselves, or no more",
        handler=schedule,
        body=SetSchedule,
        answer=Instance,
    ),
    Route(method="POST", path=f"{_ONE}/kill", summary="Send a signal to its first process", handler=kill, body=Kill),
    Route(
        method="GET",
        path=f"{_ONE}/wait",
        summary="Wait until it has ended and nothing will start it again",
        handler=wait,
        answer=WaitOutcome,
        query=(("timeout_s", "number", "how long to wait, 30 by default"),),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/logs",
        summary="Its output, one JSON object a line",
        handler=logs,
        answer=LogLine,
        media_type="application/x-ndjson",
        query=(
            ("follow", "boolean", "go on until it has ended"),
            ("tail", "integer", "only so many of the last lines"),
            ("since", "string", "only lines from this time on, RFC 3339"),
        ),
    ),
    Route(method="GET", path=f"{_ONE}/stats", summary="What it uses now", handler=stats, answer=InstanceStats),
    Route(
        method="GET",
        path=f"{_ONE}/changes",
        summary="What it wrote to its root, beside its image",
        handler=changes,
        answer=Changes,
    ),
)
