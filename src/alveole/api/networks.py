"""Routes of networks."""

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
from alveole.control import keys, networks
from alveole.control.commit import find
from alveole.model.base import Record
from alveole.model.network import Network
from alveole.model.operation import Operation


class CreateNetwork(Record):
    """Without a subnet, the next free one of the host's pool."""

    name: str
    subnet: str | None = None
    internal: bool = False


async def index(service: Service, request: Request) -> Response:
    return list_response(service, [entry.record for entry in table(service, request, "networks")])


async def show(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    return record_response(find(service.context, keys.network(project_of(request), name), f"network {name}").record)


async def create(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, CreateNetwork)
    operation = await networks.create(
        service.context,
        project_of(request),
        body.name,
        body.subnet,
        internal=body.internal,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def remove(service: Service, request: Request) -> Response:
    operation = await networks.remove(
        service.context, project_of(request), request.path_params["name"], idempotency_of(request, None)
    )
    return await operation_response(service, request, operation)


ROUTES = (
    Route(method="GET", path="/networks", summary="List networks", handler=index, answer=Network, listing=True),
    Route(
        method="POST",
        path="/networks",
        summary="Create a network",
        handler=create,
        body=CreateNetwork,
        answer=Operation,
        status=202,
    ),
    Route(method="GET", path="/networks/{name}", summary="One network", handler=show, answer=Network),
    Route(
        method="DELETE",
        path="/networks/{name}",
        summary="Remove a network that no instance is on",
        handler=remove,
        answer=Operation,
        status=202,
    ),
)
