"""Routes of volumes."""

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
from alveole.control import attach, keys, volumes
from alveole.control.commit import find
from alveole.model.base import Record
from alveole.model.operation import Operation
from alveole.model.volume import Volume


class CreateVolume(Record):
    """The size holds: writing beyond it fails inside as on a full disk."""

    name: str
    size_bytes: int = volumes.DEFAULT_SIZE_BYTES


class AttachVolume(Record):
    """Where a running instance shall see it."""

    instance: str
    target: str
    read_only: bool = False


class DetachVolume(Record):
    instance: str


async def index(service: Service, request: Request) -> Response:
    return list_response(service, [entry.record for entry in table(service, request, "volumes")])


async def show(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    return record_response(find(service.context, keys.volume(project_of(request), name), f"volume {name}").record)


async def create(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, CreateVolume)
    operation = await volumes.create(
        service.context,
        project_of(request),
        body.name,
        body.size_bytes,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def remove(service: Service, request: Request) -> Response:
    operation = await volumes.remove(
        service.context, project_of(request), request.path_params["name"], idempotency_of(request, None)
    )
    return await operation_response(service, request, operation)


async def attach_to(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, AttachVolume)
    operation = await attach.attach(
        service.context,
        project_of(request),
        body.instance,
        request.path_params["name"],
        target=body.target,
        read_only=body.read_only,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def detach_from(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, DetachVolume)
    operation = await attach.detach(
        service.context,
        project_of(request),
        body.instance,
        request.path_params["name"],
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


ROUTES = (
    Route(method="GET", path="/volumes", summary="List volumes", handler=index, answer=Volume, listing=True),
    Route(
        method="POST",
        path="/volumes",
        summary="Create a volume",
        handler=create,
        body=CreateVolume,
        answer=Operation,
        status=202,
    ),
    Route(method="GET", path="/volumes/{name}", summary="One volume", handler=show, answer=Volume),
    Route(
        method="DELETE",
        path="/volumes/{name}",
        summary="Remove a volume that no instance refers to",
        handler=remove,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path="/volumes/{name}/attach",
        summary="Mount it in a running instance",
        handler=attach_to,
        body=AttachVolume,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path="/volumes/{name}/detach",
        summary="Unmount it from a running instance",
        handler=detach_from,
        body=DetachVolume,
        answer=Operation,
        status=202,
    ),
)
