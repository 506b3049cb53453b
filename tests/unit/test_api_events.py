"""The event stream as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from alveole.api.system import ALIVE_EVERY_S
from tests.unit.test_api_routes import run, serving
from tests.virtual import virtual


async def read(chunks: AsyncIterator[bytes], seconds: float = 1.0) -> list[dict[str, Any]]:
    """The events that arrive within the time."""
    found: list[dict[str, Any]] = []
    while True:
        try:
            async with asyncio.timeout(seconds):
                text = (await anext(chunks)).decode()
        except TimeoutError:
            return found
        assert text.endswith("\n\n")
        lines = dict(line.split(": ", 1) for line in text.strip().splitlines() if not line.startswith(":"))
        if lines:
            data = json.loads(lines["data"])
            assert (lines["id"], lines["event"]) == (data["revision"], data["kind"])
            found.append(data)


@virtual
async def test_changes_are_told_from_now_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        await run(client, "before")
        async with client.stream("GET", "/v1/events") as (head, chunks):
            assert (head.status, head.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
            assert await read(chunks) == []
            await run(client, "web")
            told = await read(chunks)
        created = next(event for event in told if event["kind"] == "instance")
        assert (created["action"], created["name"], created["object"]["name"]) == ("created", "web", "web")
        last = [event for event in told if event["kind"] == "instance"][-1]
        assert last["object"]["status"]["phase"] == "running"
        assert all(event["name"] != "before" for event in told)
        assert {event["object"]["id"] for event in told if event["kind"] == "operation"} == {
            o.id for o in world.records("operations") if o.target == "instance/web"
        }


@pytest.mark.parametrize("how", ["header", "query"])
@virtual
async def test_a_stream_goes_on_after_the_last_event(how: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        begin = (await client.call("GET", "/v1/instances")).json["revision"]
        await run(client)

        def after(token: str) -> Any:
            if how == "header":
                return client.stream("GET", "/v1/events", headers={"Last-Event-ID": token})
            return client.stream("GET", "/v1/events", from_=token)

        async with after(begin) as (_head, chunks):
            told = await read(chunks)
        revisions = list(dict.fromkeys(event["revision"] for event in told))
        assert len(revisions) >= 3
        for revision in revisions:
            async with after(revision) as (_head, chunks):
                rest = await read(chunks)
            position = max(n for n, event in enumerate(told) if event["revision"] == revision)
            assert rest == told[position + 1 :]


@virtual
async def test_a_removal_has_no_object(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await client.call("POST", "/v1/networks", {"name": "net"})
        async with client.stream("GET", "/v1/events") as (_head, chunks):
            await read(chunks)
            await client.call("DELETE", "/v1/networks/net")
            told = await read(chunks)
        removed = next(event for event in told if event["action"] == "removed")
        assert (removed["kind"], removed["name"], removed["object"]) == ("network", "net", None)


@pytest.mark.parametrize(
    ("token", "status"), [("nonsense", 400), ("{store}:x", 400), ("{store}:999999", 400), ("00000000:1", 410)]
)
@virtual
async def test_tokens_that_cannot_be_gone_on_from(token: str, status: int, tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        answer = await client.call("GET", "/v1/events", from_=token.format(store=world.store.id))
        assert answer.status == status


@virtual
async def test_history_that_is_gone_is_told_before_the_stream_begins(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        begin = (await client.call("GET", "/v1/instances")).json["revision"]
        await run(client)
        await world.store.compact(world.context.cache.revision)
        answer = await client.call("GET", "/v1/events", from_=begin)
        assert (answer.status, answer.code) == (410, "gone")
        assert "list again" in answer.json["error"]["hint"]


@virtual
async def test_a_silent_stream_shows_that_it_lives(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client), client.stream("GET", "/v1/events") as (_head, chunks):
        assert await anext(chunks) == b": events\n\n"
        before = asyncio.get_running_loop().time()
        assert await anext(chunks) == b": alive\n\n"
        assert asyncio.get_running_loop().time() - before == pytest.approx(ALIVE_EVERY_S)
