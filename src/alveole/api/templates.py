"""Routes of templates. They are the node's, not the project's; what is done to them is an operation of the project."""

from starlette.requests import Request
from starlette.responses import Response

from alveole.api.service import (
    Nothing,
    Route,
    Service,
    idempotency_of,
    list_response,
    operation_response,
    project_of,
    record_response,
)
from alveole.api.strict import read_body
from alveole.control import templates
from alveole.model.operation import Operation
from alveole.model.template import Template
from alveole.policy.template import find_template


async def index(service: Service, _request: Request) -> Response:
    return list_response(service, list(await service.streams.templates()))


async def show(service: Service, request: Request) -> Response:
    return record_response(find_template(await service.streams.templates(), request.path_params["key"]))


async def remove(service: Service, request: Request) -> Response:
    operation = await templates.remove(
        service.context,
        project_of(request),
        await service.streams.templates(),
        request.path_params["key"],
        idempotency_of(request, None),
    )
    return await operation_response(service, request, operation)


async def refresh(service: Service, request: Request) -> Response:
    _, raw = await read_body(request, Nothing)
    operation = await templates.refresh(
        service.context,
        project_of(request),
        await service.streams.templates(),
        request.path_params["key"],
        idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


ROUTES = (
    Route(
        method="GET",
        path="/templates",
        summary="List what machines go on from in place of booting",
        handler=index,
        answer=Template,
        listing=True,
    ),
    Route(
        method="GET",
        path="/templates/{key}",
        summary="One template, by its key or the beginning of it",
        handler=show,
        answer=Template,
    ),
    Route(
        method="DELETE",
        path="/templates/{key}",
        summary="Remove a template; instances that go on from it keep what they have of it",
        handler=remove,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path="/templates/{key}/refresh",
        summary="Make a template afresh; the old one serves until then",
        handler=refresh,
        body=Nothing,
        answer=Operation,
        status=202,
    ),
)
