"""The client's HTTP against bytes on a socket, whole and broken."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.client.http import BrokenAnswerError, exchange


def answered(data: bytes) -> tuple[int, list[bytes]]:
    """What the client makes of these bytes: status and lines."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        response = exchange(ours, "GET", "/", b"", {})
        return response.status, list(response.lines())


def chunked(chunks: list[bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
    return head + b"".join(b"%X;ext=1\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8))
def test_chunks_give_the_lines_they_hold(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    expected = [line.removesuffix(b"\r") for line in whole.split(b"\n")[:-1]]
    rest = whole.split(b"\n")[-1]
    assert answered(chunked(chunks)) == (200, expected + ([rest] if rest else []))


@given(st.integers(min_value=0))
def test_an_answer_cut_anywhere_is_broken_not_short(where: int) -> None:
    data = chunked([b"first\n", b"second\n"])
    where %= len(data) - 2  # without the last empty line nothing of the body is missing
    with pytest.raises(BrokenAnswerError):
        answered(data[:where])


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfour",
        b"",
    ],
)
def test_what_is_not_an_answer_is_told(data: bytes) -> None:
    with pytest.raises(BrokenAnswerError):
        answered(data)


def test_without_a_length_the_body_ends_with_the_connection() -> None:
    assert answered(b"HTTP/1.1 200 OK\r\n\r\na\nb") == (200, [b"a", b"b"])


def test_the_request_is_sent_whole() -> None:
    def pieces() -> Iterator[bytes]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            exchange(ours, "POST", "/v1/x?project=a", b'{"a":1}', {"Idempotency-Key": "k"})
            yield theirs.recv(4096)

    head, _, body = next(pieces()).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/x?project=a HTTP/1.1"
    assert {b"Idempotency-Key: k", b"Content-Length: 7", b"Host: localhost"} <= set(lines)
    assert body == b'{"a":1}'
