"""The client's transport against a real server on a Unix socket: answers, errors, streams and broken connections."""

import grp
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alveole.client.api import Client, parse_events
from alveole.client.errors import ApiError
from tests.daemon_double import Double, Reply, operation, serving


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Double]:
    with serving(tmp_path / "s") as double:
        yield double


def test_lists_filters_and_project_travel_in_the_query(daemon: Double) -> None:
    daemon.answers["GET /v1/instances"] = Reply({"items": [{"name": "web"}], "revision": "x:1"})
    assert Client(daemon.path, "blue").instances(["label=a=b", "phase=running"]) == [{"name": "web"}]
    assert daemon.requests[0].query == {"project": ["blue"], "filter": ["label=a=b", "phase=running"]}


def test_an_error_arrives_whole(daemon: Double) -> None:
    record = {"code": "conflict", "message": "web is running", "hint": "stop it", "field": "name"}
    daemon.answers["DELETE /v1/instances/web"] = Reply({"error": record}, 409)
    with pytest.raises(ApiError) as caught:
        Client(daemon.path).remove_instance("web")
    error = caught.value
    assert (error.code, error.message, error.hint, error.field) == tuple(record.values())


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"error": "text"}', b""])
def test_an_error_without_a_reason_is_still_an_api_error(daemon: Double, body: bytes) -> None:
    daemon.answers["GET /v1/version"] = Reply(body, 500)
    with pytest.raises(ApiError, match="answered 500 without a reason"):
        Client(daemon.path).version()


def test_a_stopped_daemon_is_named_with_the_way_to_start_it(tmp_path: Path) -> None:
    with pytest.raises(ApiError) as caught:
        Client(str(tmp_path / "none")).version()
    assert caught.value.code == "unavailable"
    assert str(tmp_path / "none") in caught.value.message
    assert "alveole serve" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_forbidden_socket_names_the_group_that_may_use_it() -> None:
    """As another user, because root itself is never refused."""
    directory = Path(tempfile.mkdtemp())  # pytest's own is closed to others
    path = directory / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        directory.chmod(0o755)
        path.chmod(0o660)
        os.chown(path, 0, 1)
        os.seteuid(65534)
        try:
            with pytest.raises(ApiError) as caught:
                Client(str(path)).version()
        finally:
            os.seteuid(0)
            path.unlink()
            directory.rmdir()
    assert caught.value.code == "denied"
    assert f"the group {grp.getgrgid(1).gr_name}:" in caught.value.hint


@pytest.mark.parametrize("cut", [0, 5, 40, 75])
def test_a_mutation_is_repeated_with_its_key_when_the_connection_breaks(daemon: Double, cut: int) -> None:
    replies = iter([Reply({"some": "answer that is cut"}, hang_up_after=cut), Reply(operation("v", "volume/data"))])
    daemon.answers["POST /v1/volumes"] = lambda _request: next(replies)
    assert Client(daemon.path).create_volume("data", wait_s=3)["target"] == "volume/data"
    first, second = daemon.requests
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert first.headers["Prefer"] == "wait=3"
    assert first.body == second.body == {"name": "data"}


def test_each_mutation_has_a_key_of_its_own(daemon: Double) -> None:
    daemon.answers["POST /v1/instances/web/kill"] = Reply({})
    client = Client(daemon.path)
    client.kill_instance("web")
    client.kill_instance("web")
    keys = {request.headers["Idempotency-Key"] for request in daemon.requests}
    assert len(keys) == 2
    assert all(len(key) <= 64 for key in keys)


def test_a_daemon_that_restarts_meanwhile_is_waited_for(tmp_path: Path) -> None:
    """The first daemon takes the request and dies; the second comes half a second later on the same path."""
    path = tmp_path / "s"
    first = socket.socket(socket.AF_UNIX)
    first.bind(str(path))
    first.listen()

    def die() -> None:
        connection, _ = first.accept()
        connection.recv(1)
        connection.close()
        first.close()
        path.unlink()

    thread = threading.Thread(target=die)
    thread.start()
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(Client(str(path)).version()))
    asking.start()
    thread.join()
    time.sleep(0.5)
    with serving(path) as double:
        double.answers["GET /v1/version"] = Reply({"version": "2"})
        asking.join()
    assert answers == [{"version": "2"}]


def test_log_lines_arrive_however_they_are_cut(daemon: Double) -> None:
    text = b'{"line": "one"}\n{"line": "tw\xc3\xb6"}\n'
    daemon.answers["GET /v1/instances/web/logs"] = Reply(chunks=tuple(text[i : i + 1] for i in range(len(text))))
    lines = Client(daemon.path).logs("web", tail=5)
    assert [record["line"] for record in lines] == ["one", "twö"]
    assert daemon.requests[0].query == {"project": ["default"], "follow": ["false"], "tail": ["5"]}


def test_a_stream_that_breaks_is_not_taken_for_its_end(daemon: Double) -> None:
    daemon.answers["GET /v1/instances/web/logs"] = Reply(chunks=(b'{"line": "one"}\n', b"x"), hang_up_after=110)
    lines = Client(daemon.path).logs("web")
    assert next(lines)["line"] == "one"
    with pytest.raises(ApiError, match="ended the stream"):
        next(lines)


def test_an_error_within_a_stream_is_raised(daemon: Double) -> None:
    daemon.answers["GET /v1/instances/web/logs"] = Reply(chunks=(b'{"error": {"code": "gone", "message": "m"}}\n',))
    with pytest.raises(ApiError, match="m"):
        list(Client(daemon.path).logs("web"))


def test_an_error_before_a_stream_is_raised(daemon: Double) -> None:
    with pytest.raises(ApiError, match="events does not exist"):
        list(Client(daemon.path).events())


def test_events_are_read_and_comments_passed_over() -> None:
    lines = b': alive\n\nid: s:7\nevent: instance\ndata: {"action":\ndata: "created"}\n\n: alive\n\nid: s:8\n\n'
    events = list(parse_events(iter(lines.split(b"\n"))))
    assert events == [("s:7", "instance", {"action": "created"})]


@pytest.mark.parametrize("ref", ["", ".", ".."])
def test_a_name_that_would_address_something_else_is_refused(daemon: Double, ref: str) -> None:
    with pytest.raises(ApiError, match="names nothing"):
        Client(daemon.path).remove_instance(ref)
    assert daemon.requests == []


@pytest.mark.parametrize(
    ("ref", "path"),
    [("a b", "/v1/instances/a%20b"), ("a/b", "/v1/instances/a%2Fb"), ("a?x=1#", "/v1/instances/a%3Fx%3D1%23")],
)
def test_odd_names_stay_one_part_of_the_path(daemon: Double, ref: str, path: str) -> None:
    daemon.answers[f"GET {path}"] = Reply({"name": "x"})
    assert Client(daemon.path).instance(ref) == {"name": "x"}


def test_image_names_keep_their_slashes(daemon: Double) -> None:
    daemon.answers["GET /v1/images/docker.io/library/a:1"] = Reply({"name": "x"})
    assert Client(daemon.path).image("docker.io/library/a:1") == {"name": "x"}
