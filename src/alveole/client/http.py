"""The part of HTTP/1.1 that the client speaks: one request and its answer on one connection.

The standard library's client parses mail headers and loads TLS, which would double the time the command line takes
to start (20 of 60 ms); the other end is always our own daemon.
"""

import socket
from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import NamedTuple

_LINE_LIMIT_BYTES = 64 << 10


class BrokenAnswerError(Exception):
    """The connection ended within the answer, or what came is not HTTP."""


class Response(NamedTuple):
    status: int
    chunks: Iterator[bytes]  # the body as it arrives; raises BrokenAnswerError if it ends early

    def read(self) -> bytes:
        return b"".join(self.chunks)

    def lines(self) -> Iterator[bytes]:
        """Lines as they arrive, without their ends."""
        rest = b""
        for chunk in self.chunks:
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line.removesuffix(b"\r")
        if rest:
            yield rest


def exchange(sock: socket.socket, method: str, target: str, body: bytes, headers: Mapping[str, str]) -> Response:
    """Send a request and read the head of its answer. Raises OSError and BrokenAnswerError."""
    fields = {"Host": "localhost", "Content-Length": str(len(body)), **headers, "Connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    sock.sendall(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("ascii") + body)
    file = sock.makefile("rb")
    status = _status(_line(file))
    received = dict(_header(line) for line in iter(lambda: _line(file), b""))
    return Response(status, _body(file, received))


def _line(file: BufferedReader) -> bytes:
    line = file.readline(_LINE_LIMIT_BYTES)
    if not line.endswith(b"\n"):
        raise BrokenAnswerError("the connection ended within a line")
    return line.rstrip(b"\r\n")


def _status(line: bytes) -> int:
    version, _, rest = line.partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise BrokenAnswerError(f"{line[:40]!r} is not the beginning of an answer")
    return int(rest[:3])


def _header(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode("latin-1").partition(":")
    return name.strip().lower(), value.strip().lower()


def _body(file: BufferedReader, headers: Mapping[str, str]) -> Iterator[bytes]:
    if headers.get("transfer-encoding") == "chunked":
        while size := _number(_line(file).partition(b";")[0], 16):
            yield _exactly(file, size)
            _line(file)
    elif "content-length" in headers:
        yield _exactly(file, _number(headers["content-length"].encode(), 10))
    else:
        yield file.read()


def _number(text: bytes, base: int) -> int:
    try:
        return int(text, base)
    except ValueError as error:
        raise BrokenAnswerError(f"{text[:20]!r} is not a length") from error


def _exactly(file: BufferedReader, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise BrokenAnswerError("the connection ended within the answer")
    return data
