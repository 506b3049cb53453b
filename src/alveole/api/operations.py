"""Routes of operations."""

from starlette.requests import Request
from starlette.responses import Response

from alveole.api.service import Route, Service, list_response, project_of, record_response, table, timeout_of
from alveole.control import keys, operations
from alveole.control.commit import find
from alveole.control.query import wait_operation
from alveole.model.operation import Operation


async def index(service: Service, request: Request) -> Response:
    return list_response(service, [entry.record for entry in table(service, request, "operations")])


async def show(service: Service, request: Request) -> Response:
    identifier = request.path_params["id"]
    key = keys.operation(project_of(request), identifier)
    return record_response(find(service.context, key, f"operation {identifier}").record)


async def wait(service: Service, request: Request) -> Response:
    operation = await wait_operation(
        service.context.cache, project_of(request), request.path_params["id"], timeout_of(request)
    )
    return record_response(operation)


async def cancel(service: Service, request: Request) -> Response:
    return record_response(
        await operations.cancel(service.context, project_of(request), request.path_params["id"]), status=202
    )


ROUTES = (
    Route(method="GET", path="/operations", summary="List operations", handler=index, answer=Operation, listing=True),
    Route(method="GET", path="/operations/{id}", summary="One operation", handler=show, answer=Operation),
    Route(
        method="GET",
        path="/operations/{id}/wait",
        summary="Wait until it is finished",
        handler=wait,
        answer=Operation,
        query=(("timeout_s", "number", "how long to wait, 30 by default"),),
    ),
    Route(
        method="POST",
        path="/operations/{id}/cancel",
        summary="Cancel it and undo what it did",
        handler=cancel,
        answer=Operation,
        status=202,
    ),
)
