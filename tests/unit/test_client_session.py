"""Exec and attach sessions against a real WebSocket server: streams, exit codes, errors, and no deadlock."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.server import ServerConnection, unix_serve

from alveole.client.api import Client
from alveole.client.errors import ApiError
from alveole.client.session import Ended, Output, Session

Handler = Callable[[ServerConnection], None]


@contextmanager
def answering(path: Path, handler: Handler) -> Iterator[Client]:
    with unix_serve(handler, str(path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Client(str(path), "blue")
        finally:
            server.shutdown()
            thread.join()


def drain(session: Session) -> list[Output | Ended]:
    """All that comes until the session ends."""
    events: list[Output | Ended] = []
    while not (events and isinstance(events[-1], Ended)):
        assert session.wait_readable(10), "the server said nothing for 10 s"
        events.extend(session.receive())
    return events


def test_streams_are_kept_apart_and_the_exit_code_is_last(tmp_path: Path) -> None:
    asked: list[Any] = []

    def handler(socket: ServerConnection) -> None:
        asked.append(socket.request.path if socket.request else "")
        asked.append(json.loads(socket.recv()))
        socket.send(b"\x01out")
        socket.send(b"\x02err")
        socket.send([b"\x01frag", b"men", b"ted"])
        socket.send(json.dumps({"exit_code": 7}))

    with answering(tmp_path / "s", handler) as client, client.exec("web", {"command": ["ls"]}) as session:
        assert drain(session) == [Output(1, b"out"), Output(2, b"err"), Output(1, b"fragmented"), Ended(7)]
    assert asked == ["/v1/instances/web/exec?project=blue", {"command": ["ls"]}]


def test_an_error_of_the_session_is_raised(tmp_path: Path) -> None:
    def handler(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(json.dumps({"error": {"code": "conflict", "message": "web is stopped", "hint": "start it"}}))

    with (
        answering(tmp_path / "s", handler) as client,
        client.attach("web") as session,
        pytest.raises(ApiError, match="web is stopped"),
    ):
        drain(session)


def test_a_session_that_breaks_has_no_exit_code(tmp_path: Path) -> None:
    def handler(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(b"\x01half")
        socket.socket.close()

    with answering(tmp_path / "s", handler) as client, client.attach("web") as session:
        assert drain(session)[-1] == Ended(None)


def test_a_refused_session_tells_the_servers_reason(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def refuse(connection: ServerConnection, _request: object) -> Any:
        return connection.respond(404, json.dumps({"error": {"code": "not_found", "message": "no such thing"}}))

    with unix_serve(lambda _socket: None, str(path), process_request=refuse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ApiError, match="no such thing"):
                Client(str(path)).attach("web")
        finally:
            server.shutdown()
            thread.join()


def test_input_resize_and_end_of_input_arrive_in_order(tmp_path: Path) -> None:
    received: list[Any] = []

    def handler(socket: ServerConnection) -> None:
        received.extend(socket.recv() for _ in range(4))
        socket.send(json.dumps({"exit_code": 0}))

    with answering(tmp_path / "s", handler) as client, client.attach("web", rows=3, columns=4) as session:
        session.send_stdin(b"typed")
        session.resize(5, 6)
        session.close_stdin()
        assert drain(session) == [Ended(0)]
    assert [json.loads(received[0]), received[1]] == [{"rows": 3, "columns": 4}, b"typed"]
    assert [json.loads(text) for text in received[2:]] == [{"resize": [5, 6]}, {"close_stdin": True}]


def test_a_server_that_reads_nothing_stops_our_input_but_not_its_output(tmp_path: Path) -> None:
    """`cat bigfile | alveole run -i IMAGE cat`: the instance fills its output before it reads on."""
    read_on = threading.Event()
    total = 0

    def handler(socket: ServerConnection) -> None:
        nonlocal total
        socket.recv()
        socket.send(b"\x01" + b"x" * 1_000_000)
        read_on.wait(20)
        while isinstance(message := socket.recv(), bytes):
            total += len(message)
        socket.send(json.dumps({"exit_code": 0}))

    with answering(tmp_path / "s", handler) as client, client.attach("web") as session:
        sent = 0
        while session.ready_for_input:
            session.send_stdin(b"y" * 60_000)
            sent += 60_000
            assert sent < 64 << 20, "input is taken without end"
        got = 0
        while got < 1_000_000:
            assert session.wait_readable(10)
            got += sum(len(event.data) for event in session.receive() if isinstance(event, Output))
        read_on.set()
        session.close_stdin()
        while session.unsent:
            session.flush()
        assert drain(session)[-1] == Ended(0)
    assert total == sent
