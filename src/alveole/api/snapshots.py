"""Routes of snapshots."""

from starlette.requests import Request
from starlette.responses import Response

from alveole.api.service import (
    Route,
    Service,
    idempotency_of,
    list_response,
    operation_response,
    project_of,
    record_response,
    table,
)
from alveole.api.strict import read_body
from alveole.control import keys, snapshots
from alveole.control.commit import find
from alveole.model.agent import Changes
from alveole.model.base import Record
from alveole.model.operation import Operation
from alveole.model.snapshot import Snapshot


class CreateSnapshot(Record):
    """Without a name it gets one made of the instance's and the time."""

    instance: str
    name: str | None = None
    memory: bool = False  # and processes


class RestoreSnapshot(Record):
    """The instance it was taken of, by whatever name that has."""

    instance: str | None = None


class ForkSnapshot(Record):
    """The new instance's name; without one it gets one made of the original's. ``network`` absent: as that was."""

    name: str | None = None
    network: str | None = None


async def index(service: Service, request: Request) -> Response:
    return list_response(service, [entry.record for entry in table(service, request, "snapshots")])


async def show(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    return record_response(find(service.context, keys.snapshot(project_of(request), name), f"snapshot {name}").record)


async def changes(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    found = find(service.context, keys.snapshot(project_of(request), name), f"snapshot {name}").record
    return record_response(await service.streams.snapshot_changes(found))


async def create(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, CreateSnapshot)
    operation = await snapshots.create(
        service.context,
        project_of(request),
        body.instance,
        name=body.name,
        memory=body.memory,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def remove(service: Service, request: Request) -> Response:
    operation = await snapshots.remove(
        service.context, project_of(request), request.path_params["name"], idempotency_of(request, None)
    )
    return await operation_response(service, request, operation)


async def restore(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, RestoreSnapshot)
    operation = await snapshots.restore(
        service.context,
        project_of(request),
        request.path_params["name"],
        body.instance,
        idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def fork(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, ForkSnapshot)
    operation = await snapshots.fork(
        service.context,
        project_of(request),
        request.path_params["name"],
        new=body.name,
        network=body.network,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


ROUTES = (
    Route(method="GET", path="/snapshots", summary="List snapshots", handler=index, answer=Snapshot, listing=True),
    Route(
        method="POST",
        path="/snapshots",
        summary="Keep what an instance is now",
        handler=create,
        body=CreateSnapshot,
        answer=Operation,
        status=202,
    ),
    Route(method="GET", path="/snapshots/{name}", summary="One snapshot", handler=show, answer=Snapshot),
    Route(
        method="GET",
        path="/snapshots/{name}/changes",
        summary="What its instance had written to its root then, beside its image",
        handler=changes,
        answer=Changes,
    ),
    Route(
        method="DELETE",
        path="/snapshots/{name}",
        summary="Remove a snapshot; what began from it stays",
        handler=remove,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path="/snapshots/{name}/restore",
        summary="Let its instance be what it was then",
        handler=restore,
        body=RestoreSnapshot,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path="/snapshots/{name}/fork",
        summary="A new instance that begins as what was kept",
        handler=fork,
        body=ForkSnapshot,
        answer=Operation,
        status=202,
    ),
)
