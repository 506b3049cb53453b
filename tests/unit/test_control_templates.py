"""Templates through API, control plane and agent, in virtual time: shown, removed, made afresh, and left by a crash."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from alveole.api.app import make_app
from alveole.control import operations
from alveole.model.operation import OperationState
from tests.asgi import Client
from tests.control_world import World, living
from tests.virtual import virtual

WAIT = {"Prefer": "wait=60"}
KEYS = ("3f2a000000000000", "a000000000000000")


@asynccontextmanager
async def serving(root: Path, **fields: Any) -> AsyncIterator[tuple[World, Client]]:
    async with living(root, **fields) as world:
        for key in KEYS:
            world.templates.add(key)
        yield world, Client(make_app(world.service()))


@virtual
async def test_all_are_listed_once_with_who_runs_on_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        await world.run("web")
        await world.run("ended", ("ok",))
        await world.until(lambda: world.instance("ended").status.phase == "exited")
        listed = (await client.call("GET", "/v1/templates")).json["items"]
        assert [(one["key"], one["node"], one["instances"]) for one in listed] == [
            (KEYS[0], "node-1", 1),
            (KEYS[1], "node-1", 0),
        ]
        assert (await client.call("GET", "/v1/templates/3f")).json == listed[0]
        assert (await client.call("GET", "/v1/templates/b")).code == "not_found"


@virtual
async def test_one_is_removed_by_the_beginning_of_its_key(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        removed = (await client.call("DELETE", "/v1/templates/3f", headers=WAIT)).json
        assert (removed["state"], removed["verb"], removed["target"]) == ("done", "template.rm", f"template/{KEYS[0]}")
        assert removed["result"] == {"freed_bytes": 600, "held_bytes": 400}
        assert set(world.templates.known) == {KEYS[1]}
        again = await client.call("DELETE", "/v1/templates/3f", headers=WAIT)
        assert (again.status, again.code) == (404, "not_found")
        assert not [one for one in world.records("operations") if one.state is OperationState.RUNNING]


@virtual
async def test_a_removal_asked_for_again_with_its_key_is_the_same(tmp_path: Path) -> None:
    """Also when what it removed is gone."""
    async with serving(tmp_path) as (_, client):
        headers = {**WAIT, "Idempotency-Key": "once"}
        first = await client.call("DELETE", "/v1/templates/3f", headers=headers)
        again = await client.call("DELETE", "/v1/templates/3f", headers=headers)
        assert (first.status, again.status) == (202, 202)
        assert first.json["id"] == again.json["id"]


@virtual
async def test_a_refresh_runs_as_nobody_else_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        await world.run("web")
        taken = set(world.network.ranges)
        refreshed = (await client.call("POST", "/v1/templates/a/refresh", {}, headers=WAIT)).json
        assert (refreshed["state"], refreshed["verb"]) == ("done", "template.refresh")
        assert [step["name"] for step in refreshed["steps"]] == ["refresh"]
        assert world.templates.known[KEYS[1]].cause == "refreshed"
        (workplace,) = world.templates.workplaces
        assert workplace.ids.base not in taken
        assert workplace.cgroup == "alveole-0a1b2c3d"
        assert world.network.ranges == taken
        world.check()


@virtual
async def test_a_refresh_that_is_cancelled_gives_everything_back(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        world.templates.gate.clear()
        begun = (await client.call("POST", "/v1/templates/a/refresh", {})).json
        await world.until(lambda: bool(world.templates.workplaces))
        assert world.network.attachments
        cancelled = await operations.cancel(world.context, "default", begun["id"])
        assert cancelled.state is OperationState.CANCELLED
        await world.settle()
        assert world.templates.known[KEYS[1]].cause == "wanted"
        assert not world.network.ranges
        world.check()


@virtual
async def test_two_refreshes_at_once_are_not_in_each_others_way(tmp_path: Path) -> None:
    """The first to end takes nothing from the other."""
    async with serving(tmp_path) as (world, client):
        world.templates.gate.clear()
        begun = [(await client.call("POST", "/v1/templates/a/refresh", {})).json for _ in range(2)]
        await world.until(lambda: len(world.templates.workplaces) == 2)
        assert len({workplace.ids.base for workplace in world.templates.workplaces}) == 2
        await operations.cancel(world.context, "default", begun[0]["id"])
        await world.until(lambda: len(world.network.attachments) == 1)
        world.templates.gate.set()
        ended = await world.finished(world.operation(begun[1]["id"]))
        assert ended.state is OperationState.DONE
        await world.settle()
        world.check()


@virtual
async def test_what_a_dead_agent_began_the_next_one_ends(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        world.templates.gate.clear()
        refreshing = (await client.call("POST", "/v1/templates/a/refresh", {})).json
        await world.until(lambda: bool(world.templates.workplaces))
        removing = (await client.call("DELETE", "/v1/templates/3f")).json
        await world.agent_down()
        world.templates.known.pop(KEYS[0], None)  # it may have died just after
        world.templates.gate.set()
        await asyncio.sleep(1)
        await world.agent_up()
        for begun in (refreshing, removing):
            ended = await world.finished(world.operation(begun["id"]))
            assert ended.state is OperationState.DONE, ended.error
        assert world.templates.known[KEYS[1]].cause == "refreshed"
        world.check()


@virtual
async def test_one_that_is_gone_when_its_turn_comes_cannot_be_made_afresh(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        world.templates.gate.clear()
        await world.agent_down()
        service_of_old = client  # its agent is dead; what it asks of the node is what the node had then
        begun = (await service_of_old.call("POST", "/v1/templates/a/refresh", {})).json
        world.templates.known.pop(KEYS[1])
        await world.agent_up()
        ended = await world.finished(world.operation(begun["id"]))
        assert ended.state is OperationState.FAILED
        assert ended.error is not None
        assert ended.error["code"] == "not_found"
        world.check()
