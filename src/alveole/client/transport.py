"""Requests over a Unix socket: one connection each, JSON in and out, every failure an ApiError.

A request that carries an idempotency key is sent again when the connection breaks before its answer came: the
daemon was restarted, and knows by the key whether it had begun.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from alveole.client.errors import ApiError
from alveole.client.http import BrokenAnswerError, exchange

ANSWER_TIMEOUT_S = 60.0
RECONNECT_S = 10.0
_RECONNECT_PAUSE_S = 0.2

Query = Mapping[str, str | int | float | bool | Sequence[str] | None]


class _ConnectionLostError(Exception):
    """The connection was made and broke before the answer: the request may have been carried out."""


def connect(path: str, timeout_s: float | None) -> socket.socket:
    """A connected socket. Raises ApiError(unavailable | denied) that says what to do."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(path)
    except PermissionError as error:
        sock.close()
        group = _group_of(path)
        raise ApiError(
            "denied",
            f"not allowed to reach the daemon at {path}",
            f"join the group {group}: sudo usermod -aG {group} $USER, then log in again",
        ) from error
    except OSError as error:
        sock.close()
        raise ApiError(
            "unavailable",
            f"cannot reach the daemon at {path}: {error.strerror or error}",
            "start it with `alveole serve`",
        ) from error
    return sock


def _group_of(path: str) -> str:
    """The group that may use the socket; of its directory, where that hides the socket."""
    import grp

    for candidate in (path, os.path.dirname(path)):  # noqa: PTH120  (pathlib costs the command line 5 ms)
        try:
            return grp.getgrgid(os.stat(candidate).st_gid).gr_name  # noqa: PTH116
        except (OSError, KeyError):
            continue
    return "alveole"


def target(path: str, query: Query) -> str:
    """Path and query as sent; absent values are left out, sequences repeated."""
    pairs: list[tuple[str, str]] = []
    for key, value in query.items():
        if value is None:
            continue
        if isinstance(value, bool):
            pairs.append((key, "true" if value else "false"))
        elif isinstance(value, str | int | float):
            pairs.append((key, str(value)))
        else:
            pairs.extend((key, item) for item in value)
    return f"{path}?{urlencode(pairs)}" if pairs else path


def request(
    socket_path: str,
    method: str,
    path: str,
    *,
    query: Query,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> Any:
    """The answer's JSON. Raises ApiError."""
    headers = dict(headers or {})
    payload = b""
    if body is not None:
        payload = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    repeatable = method == "GET" or "Idempotency-Key" in headers
    give_up_at = 0.0
    while True:
        try:
            return _ask(connect(socket_path, timeout_s), method, target(path, query), payload, headers)
        except _ConnectionLostError as lost:
            now = time.monotonic()
            give_up_at = give_up_at or now + RECONNECT_S
            if not repeatable or now >= give_up_at:
                raise ApiError(
                    "unavailable",
                    f"the daemon at {socket_path} ended the connection before it answered",
                    "see what it says in its journal, and what it had begun with `alveole operation ls`",
                ) from lost
        except ApiError as error:
            if error.code != "unavailable" or not 0 < time.monotonic() < give_up_at:
                raise
        time.sleep(_RECONNECT_PAUSE_S)


def _ask(sock: socket.socket, method: str, where: str, payload: bytes, headers: Mapping[str, str]) -> Any:
    with sock:
        try:
            response = exchange(sock, method, where, payload, headers)
            return _answer(response.status, response.read())
        except TimeoutError as error:
            raise ApiError("timeout", f"the daemon did not answer in {sock.gettimeout():g} s", "ask again") from error
        except (OSError, BrokenAnswerError) as error:
            raise _ConnectionLostError from error


def _answer(status: int, data: bytes) -> Any:
    try:
        content = json.loads(data) if data else {}
    except ValueError:
        content = None
    if status < 300 and content is not None:
        return content
    if isinstance(content, dict) and isinstance(content.get("error"), dict):
        raise ApiError.from_record(content["error"])
    raise ApiError(
        "internal",
        f"the daemon answered {status} without a reason",
        "are client and daemon of the same version? see `alveole version`",
    )


def stream(
    socket_path: str, path: str, *, query: Query, headers: Mapping[str, str] | None = None, timeout_s: float | None
) -> Iterator[bytes]:
    """The lines of an answer that goes on, without their ends. ``timeout_s`` is the longest silence borne."""
    with connect(socket_path, timeout_s) as sock:
        try:
            response = exchange(sock, "GET", target(path, query), b"", headers or {})
            if response.status >= 300:
                _answer(response.status, response.read())
            yield from response.lines()
        except (OSError, BrokenAnswerError) as error:
            raise ApiError(
                "unavailable",
                f"the daemon at {socket_path} ended the stream",
                "it was stopped or restarted: instances go on, ask again",
            ) from error
