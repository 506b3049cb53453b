"""A daemon's end of the API for tests of the client: a real server on a Unix socket that answers as it is told."""

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: Any


class Reply(NamedTuple):
    body: Any = None
    status: int = 200
    chunks: tuple[bytes, ...] | None = None  # sent chunked instead of ``body``
    hang_up_after: int | None = None  # end the connection after so many bytes of the answer


Answer = Callable[[Request], Reply] | Reply


class Double:
    """Answers by "METHOD /path"; what was asked is kept in ``requests``. Anything else is not_found."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.answers: dict[str, Answer] = {}
        self.requests: list[Request] = []

    def reply(self, request: Request) -> Reply:
        self.requests.append(request)
        answer = self.answers.get(f"{request.method} {request.path}")
        if answer is None:
            name = request.path.rpartition("/")[2]
            return Reply({"error": {"code": "not_found", "message": f"{name} does not exist", "hint": "look"}}, 404)
        return answer(request) if callable(answer) else answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: Double

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(
            self.command, parts.path, parse_qs(parts.query), dict(self.headers), json.loads(data) if data else None
        )
        reply = self.double.reply(request)
        answer = _encode(reply)
        self.wfile.write(answer if reply.hang_up_after is None else answer[: reply.hang_up_after])
        self.close_connection = True

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815  (names that http.server looks for)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Tests read what the client says, not this."""


def _encode(reply: Reply) -> bytes:
    head = f"HTTP/1.1 {reply.status} Whatever\r\nContent-Type: application/json\r\n"
    if reply.chunks is not None:
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in reply.chunks) + b"0\r\n\r\n"
        return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + body
    data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def serving(path: Path) -> Iterator[Double]:
    double = Double(path)
    handler = type("Handler", (_Handler,), {"double": double})
    with _Server(str(path), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield double
        finally:
            server.shutdown()
            thread.join()


def operation(verb: str, target: str, state: str = "done", **more: Any) -> dict[str, Any]:
    """An operation as the API answers it."""
    return {
        "kind": "operation",
        "id": "1a2b",
        "project": "default",
        "verb": verb,
        "target": target,
        "state": state,
        "created_at": "2026-01-31T12:00:00.000000Z",
        "steps": [],
        "result": {},
        **more,
    }


def instance(name: str, phase: str = "running", **spec: Any) -> dict[str, Any]:
    """An instance as the API answers it."""
    return {
        "kind": "instance",
        "id": f"{abs(hash(name)) % 16**12:012x}",
        "project": "default",
        "name": name,
        "spec": {"image": "debian:12", "isolation": "container", **spec},
        "created_at": "2026-01-31T12:00:00.000000Z",
        "status": {"phase": phase, "started_at": "2026-01-31T12:00:00.000000Z"},
    }
