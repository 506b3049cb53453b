"""Exec and attach over WebSocket: framing, errors, and what becomes of a process whose client goes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from alveole.model.agent import ExecRequest, Stream
from alveole.model.instance import Instance
from tests.asgi import Client
from tests.control_world import World
from tests.unit.test_api_routes import run, serving
from tests.virtual import virtual

EXEC, ATTACH = "/v1/instances/web/exec", "/v1/instances/web/attach"


@virtual
async def test_exec(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await run(client)
        async with client.session(EXEC) as session:
            session.send({"command": ["echo"]})
            assert await session.rest() == [b"\x01out\n", b"\x02err\n", {"exit_code": 7}]


@virtual
async def test_attach_sees_all_that_the_instance_says(tmp_path: Path) -> None:
    """``run`` with attach: the process starts only when the client is there."""
    async with serving(tmp_path) as (world, client):
        body = {"name": "web", "spec": {"image": "app", "command": ["echo"], "attach": True}}
        assert (await client.call("POST", "/v1/instances", body)).status == 202
        await asyncio.sleep(3)
        assert world.running == set()
        async with client.session(ATTACH) as session:
            session.send({"rows": 24, "columns": 80})
            assert await session.rest() == [b"\x01out\n", b"\x02err\n", {"exit_code": 7}]


@virtual
async def test_an_attached_client_that_goes_leaves_the_instance_running(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        await run(client)
        async with client.session(ATTACH) as session:
            session.send({})
            await asyncio.sleep(1)
        await asyncio.sleep(1)
        assert world.running == {"web"}


@virtual
async def test_attach_tells_why_the_run_failed(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        world.images.gate.clear()
        body = {"name": "web", "spec": {"image": "nowhere", "command": ["echo"], "attach": True}}
        await client.call("POST", "/v1/instances", body)
        async with client.session(ATTACH) as session:
            session.send({})
            await asyncio.sleep(1)
            world.images.gate.set()
            (told,) = await session.rest()
            assert told["error"]["code"] == "not_found"
            assert "nowhere" in told["error"]["message"]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("nonsense", "not JSON"),
        ("[" * 50_000, "not JSON"),
        (b"bytes", "not JSON"),
        ({"command": ["missing"]}, "not found in the image"),
        ({"comand": []}, "comand is not a field"),
        ({"command": "echo"}, "command"),
        ({}, "command"),
        ({"command": ["echo"], "rows": -1}, "rows"),
        ({"command": ["echo"], "rows": 1 << 40}, "rows"),
    ],
    ids=lambda first: repr(first)[:20],
)
@virtual
async def test_a_wrong_first_message_is_told(first: Any, message: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await run(client)
        async with client.session(EXEC) as session:
            session.send(first)
            (told,) = await session.rest()
            assert told["error"]["code"] == "invalid"
            assert message in told["error"]["message"]


@pytest.mark.parametrize("path", [EXEC, ATTACH])
@virtual
async def test_sessions_of_what_does_not_exist_or_run(path: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        async with client.session(path) as session:
            session.send({"command": ["echo"]} if path == EXEC else {})
            (told,) = await session.rest()
            assert told["error"]["code"] == "not_found"
        async with client.session(path, project="A/b") as session:
            session.send({})
            (told,) = await session.rest()
            assert told["error"]["code"] == "invalid"


@virtual
async def test_exec_needs_a_running_instance(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await run(client, command=("ok",))
        await client.call("GET", "/v1/instances/web/wait")
        async with client.session(EXEC) as session:
            session.send({"command": ["echo"]})
            (told,) = await session.rest()
            assert told["error"]["code"] == "conflict"


class FakeStream:
    """A process that says back what it is told, and remembers its terminal."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.closed = False
        self._heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def write(self, data: bytes) -> None:
        self._heard.put_nowait(data)

    async def close_stdin(self) -> None:
        self._heard.put_nowait(b"")

    async def resize(self, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        while data := await self._heard.get():
            yield 1, data

    async def wait(self) -> int:
        return 0

    async def close(self) -> None:
        self.closed = True


async def echoing(world: World, client: Client, patch: pytest.MonkeyPatch) -> FakeStream:
    """Let exec give a stream that says back what it is told."""
    stream = FakeStream()

    async def begin(_runtime: Any, _handle: Any, _request: ExecRequest, _process: Any) -> Stream:
        return stream

    await run(client)
    patch.setattr("tests.fakes.WatchedRuntime.exec", begin)
    assert isinstance(world.instance(), Instance)
    return stream


@virtual
async def test_both_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as (world, client):
        stream = await echoing(world, client, monkeypatch)
        async with client.session(EXEC) as session:
            session.send({"command": ["cat"], "stdin": True, "tty": True})
            for data in (b"one", b"\x00\xff", b"x" * 100_000):
                session.send(data)
                assert await session.receive() == b"\x01" + data
            session.send({"resize": [40, 120]})
            session.send({"close_stdin": True})
            assert await session.rest() == [{"exit_code": 0}]
        assert stream.sizes == [(40, 120)]
        assert stream.closed


@pytest.mark.parametrize(
    "order",
    [
        "nonsense",
        '"resize"',
        "[1]",
        {"resize": [1]},
        {"resize": ["a", "b"]},
        {"resize": [1e400, 1]},
        {"resize": [-1, 80]},
        {"resize": [1 << 70, 80]},
        {"unknown": 1},
    ],
    ids=repr,
)
@virtual
async def test_a_wrong_order_ends_the_session(order: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as (world, client):
        stream = await echoing(world, client, monkeypatch)
        async with client.session(EXEC) as session:
            session.send({"command": ["cat"], "stdin": True})
            session.send(order)
            (told,) = await session.rest()
            assert told["error"]["code"] == "invalid"
        assert stream.closed
        assert not stream.sizes


@virtual
async def test_a_client_that_goes_ends_its_exec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as (world, client):
        stream = await echoing(world, client, monkeypatch)
        async with client.session(EXEC) as session:
            session.send({"command": ["cat"], "stdin": True})
            await asyncio.sleep(1)
            assert not stream.closed
        assert stream.closed
