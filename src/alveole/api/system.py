"""Routes of the daemon itself: version, nodes, events."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from alveole.api.errors import error_body
from alveole.api.service import Route, Service, list_response, project_of
from alveole.control import keys
from alveole.control.events import events, parse_token
from alveole.model.base import Record
from alveole.model.error import AlveoleError
from alveole.model.node import Node

ALIVE_EVERY_S = 15.0


class Version(Record):
    version: str
    api: str
    store: str
    node: str


async def version(service: Service, _request: Request) -> Response:
    return JSONResponse(
        {"version": service.version, "api": "v1", "store": service.context.store.id, "node": service.node}
    )


async def nodes(service: Service, _request: Request) -> Response:
    return list_response(service, [entry.record for entry in service.context.cache.table(keys.NODES)])


async def follow_events(service: Service, request: Request) -> Response:
    """Server-sent events. The first error, such as a compacted revision, is told before the stream begins."""
    text = request.headers.get("last-event-id") or request.query_params.get("from")
    after = parse_token(service.context.store, text) if text else service.context.cache.revision
    await service.context.store.range("events-probe/", revision=after, limit=1)
    changes = events(service.context.store, project_of(request), after)
    return StreamingResponse(_sse(changes), media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def _sse(changes: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    yield b": events\n\n"
    pending: asyncio.Future[Any] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(changes))
            done, _ = await asyncio.wait({pending}, timeout=ALIVE_EVERY_S)
            if not done:
                yield b": alive\n\n"
                continue
            change, pending = pending.result(), None
            yield _event(change)
    except AlveoleError as error:
        yield b"event: error\ndata: " + json.dumps(error_body(error)).encode() + b"\n\n"
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait({pending})


async def _next(changes: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    return await anext(changes)


def _event(change: dict[str, Any]) -> bytes:
    """``object`` is stored JSON already: it goes into the data unparsed."""
    stored = change.pop("object")
    head = json.dumps(change)[:-1].encode()
    data = head + b',"object":' + (stored or b"null") + b"}"
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (change["revision"].encode(), change["kind"].encode(), data)


ROUTES = (
    Route(method="GET", path="/version", summary="Version of the daemon", handler=version, answer=Version),
    Route(method="GET", path="/nodes", summary="List nodes", handler=nodes, answer=Node, listing=True),
    Route(
        method="GET",
        path="/events",
        summary="Every change from now on, or after a revision",
        handler=follow_events,
        media_type="text/event-stream",
        query=(
            ("from", "string", "event token (STORE:REVISION) to go on after; the Last-Event-ID header does the same"),
        ),
    ),
)
