"""The ASGI application."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.routing import Route as HttpRoute
from starlette.websockets import WebSocket

from alveole.api import images, instances, networks, operations, sessions, snapshots, system, templates, volumes
from alveole.api.errors import error_response
from alveole.api.openapi import describe
from alveole.api.service import Route, Service, preferred_wait_s, project_of
from alveole.model.error import AlveoleError, ErrorCode, internal

log = logging.getLogger(__name__)

ROUTES: tuple[Route, ...] = (
    *system.ROUTES,
    *instances.ROUTES,
    *images.ROUTES,
    *networks.ROUTES,
    *volumes.ROUTES,
    *snapshots.ROUTES,
    *templates.ROUTES,
    *operations.ROUTES,
)


def make_app(service: Service) -> Starlette:
    description = describe(ROUTES, service.version)

    async def openapi(_request: Request) -> Response:
        return JSONResponse(description)

    routes: list[BaseRoute] = [HttpRoute("/v1/openapi.json", openapi, methods=["GET"])]
    routes += [HttpRoute(f"/v1{route.path}", _bind(service, route), methods=[route.method]) for route in ROUTES]
    routes += [
        WebSocketRoute("/v1/instances/{ref}/exec", _bind_session(service, sessions.exec_session)),
        WebSocketRoute("/v1/instances/{ref}/attach", _bind_session(service, sessions.attach_session)),
    ]
    handlers: dict[Any, Any] = {AlveoleError: _on_error, HTTPException: _on_http, Exception: _on_fault}
    return Starlette(routes=routes, exception_handlers=handlers)


def _bind(service: Service, route: Route) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        project_of(request)
        preferred_wait_s(request)
        return await route.handler(service, request)

    return endpoint


def _bind_session(
    service: Service, handler: Callable[[Service, WebSocket], Awaitable[None]]
) -> Callable[[WebSocket], Awaitable[None]]:
    async def endpoint(socket: WebSocket) -> None:
        await handler(service, socket)

    return endpoint


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, AlveoleError)  # noqa: S101  (registered for it)
    return error_response(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  (registered for it)
    code = ErrorCode.NOT_FOUND if error.status_code == 404 else ErrorCode.INVALID
    return error_response(
        AlveoleError(code, f"{request.method} {request.url.path}: {error.detail}", hint="see /v1/openapi.json")
    )


async def _on_fault(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(internal("the daemon met a fault of its own", hint="its log has the details"))
