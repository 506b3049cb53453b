"""A client of an ASGI application in the same event loop: no sockets, no threads."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import requests
from starlette.types import ASGIApp, Message


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of the error."""
        return str(self.json["error"]["code"])


class _Call:
    """One connection: what the application receives and sends."""

    def __init__(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.outgoing: asyncio.Queue[Message] = asyncio.Queue()
        self._app, self._scope = app, scope

    async def run(self) -> None:
        await self._app(self._scope, self.incoming.get, self.outgoing.put)

    async def next(self) -> Message:
        return await self.outgoing.get()


class Client:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        **query: Any,
    ) -> Answer:
        """Send a request, JSON unless ``raw``, and read the whole answer."""
        async with self.stream(method, path, body, raw=raw, headers=headers, **query) as (answer, chunks):
            data = b"".join([chunk async for chunk in chunks])
        return Answer(answer.status, answer.headers, data)

    async def request(self, request: requests.PreparedRequest) -> Answer:
        """Send a request made elsewhere."""
        parts = urlsplit(request.url or "")
        body = request.body or b""
        assert isinstance(body, str | bytes), "a request that is streamed"
        headers = {str(name): _text(value) for name, value in request.headers.items()}
        query = parse_qs(parts.query, keep_blank_values=True)
        return await self.call(
            str(request.method),
            unquote(parts.path),
            raw=body.encode() if isinstance(body, str) else body,
            headers=headers,
            **query,
        )

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        **query: Any,
    ) -> AsyncIterator[tuple[Answer, AsyncIterator[bytes]]]:
        """The head of the answer and its chunks; the connection is dropped at the end."""
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        call = _Call(self._app, _scope("http", method, path, headers or {}, query))
        call.incoming.put_nowait({"type": "http.request", "body": data, "more_body": False})
        running = asyncio.create_task(call.run())
        try:
            head = await _first(running, call)
            found = {name.decode(): value.decode() for name, value in head["headers"]}
            yield Answer(head["status"], found, b""), _Chunks(call)
        finally:
            call.incoming.put_nowait({"type": "http.disconnect"})
            await _ended(running)

    @asynccontextmanager
    async def session(self, path: str, **query: Any) -> AsyncIterator["Session"]:
        call = _Call(self._app, _scope("websocket", "GET", path, {}, query))
        call.incoming.put_nowait({"type": "websocket.connect"})
        running = asyncio.create_task(call.run())
        try:
            assert (await call.next())["type"] == "websocket.accept"
            yield Session(call)
        finally:
            call.incoming.put_nowait({"type": "websocket.disconnect", "code": 1001})
            await _ended(running)


class Session:
    """A WebSocket."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    def send(self, message: bytes | str | dict[str, Any]) -> None:
        if isinstance(message, bytes):
            self._call.incoming.put_nowait({"type": "websocket.receive", "bytes": message})
        else:
            text = message if isinstance(message, str) else json.dumps(message)
            self._call.incoming.put_nowait({"type": "websocket.receive", "text": text})

    async def receive(self) -> Any:
        """Bytes of a binary message, the JSON of a text message, None when the server has closed."""
        message = await self._call.next()
        if message["type"] == "websocket.close":
            return None
        return message["bytes"] if message.get("bytes") is not None else json.loads(message["text"])

    async def rest(self) -> list[Any]:
        """Everything up to the server's close."""
        messages = []
        while (message := await self.receive()) is not None:
            messages.append(message)
        return messages


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _scope(kind: str, method: str, path: str, headers: Mapping[str, str], query: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": kind,
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": urlencode({name.rstrip("_"): value for name, value in query.items()}, doseq=True).encode(),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
        "subprotocols": [],
        "extensions": {},
    }


async def _first(running: "asyncio.Task[None]", call: _Call) -> Message:
    """The head of the answer, or the fault of an application that died before it."""
    head = asyncio.ensure_future(call.next())
    await asyncio.wait({head, running}, return_when=asyncio.FIRST_COMPLETED)
    if not head.done():
        head.cancel()
        running.result()
    return await head


class _Chunks:
    """Not a generator: a reader may give up waiting for one chunk and come back."""

    def __init__(self, call: _Call) -> None:
        self._call, self._more = call, True

    def __aiter__(self) -> "_Chunks":
        return self

    async def __anext__(self) -> bytes:
        if not self._more:
            raise StopAsyncIteration
        message = await self._call.next()
        self._more = message.get("more_body", False)
        return bytes(message.get("body", b""))


async def _ended(running: "asyncio.Task[None]") -> None:
    done, _ = await asyncio.wait({running}, timeout=5.0)
    assert done, "the application did not end with its connection"
    running.result()
