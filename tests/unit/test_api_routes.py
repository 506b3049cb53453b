"""Every route, as a client uses it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from alveole.api.app import ROUTES, make_app
from alveole.model.agent import LogLine
from tests.asgi import Answer, Client
from tests.control_world import World, living
from tests.virtual import virtual

WAIT = {"Prefer": "wait=60"}


@asynccontextmanager
async def serving(root: Path, **fields: Any) -> AsyncIterator[tuple[World, Client]]:
    async with living(root, **fields) as world:
        yield world, Client(make_app(world.service()))


async def run(client: Client, name: str = "web", command: tuple[str, ...] = ("serve",), **spec: Any) -> Answer:
    body = {"name": name, "spec": {"image": "app", "command": list(command), **spec}}
    return await client.call("POST", "/v1/instances", body, headers=WAIT)


@virtual
async def test_the_life_of_an_instance(tmp_path: Path) -> None:
    async with serving(tmp_path, pause=lambda: 0.01) as (world, client):
        ran = await run(client)
        assert (ran.status, ran.json["state"], ran.json["target"]) == (202, "done", "instance/web")
        identifier = ran.json["result"]["id"]
        listed = (await client.call("GET", "/v1/instances")).json
        assert [item["name"] for item in listed["items"]] == ["web"]
        assert listed["revision"] == f"{world.store.id}:{world.context.cache.revision}"
        shown = (await client.call("GET", f"/v1/instances/{identifier[:6]}")).json
        assert shown["status"]["phase"] == "running"
        assert None not in shown.values(), "absent is left out"
        for verb, phase in (("stop", "exited"), ("start", "running"), ("restart", "running")):
            done = await client.call("POST", f"/v1/instances/web/{verb}", {}, headers=WAIT)
            assert (done.status, done.json["state"], done.json["verb"]) == (202, "done", f"instance.{verb}")
            assert world.instance().status.phase == phase
        refused = await client.call("DELETE", "/v1/instances/web", headers=WAIT)
        assert (refused.status, refused.code) == (409, "conflict")
        removed = await client.call("DELETE", "/v1/instances/web", headers=WAIT, force="true")
        assert removed.json["state"] == "done"
        assert (await client.call("GET", "/v1/instances/web")).status == 404
        world.check()


@virtual
async def test_kill_and_wait(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await run(client)
        assert (await client.call("GET", "/v1/instances/web/wait", timeout_s="1")).json == {"finished": False}
        for wrong in ("SIGNAL", 0, 65, "²"):
            assert (await client.call("POST", "/v1/instances/web/kill", {"signal": wrong})).code == "invalid"
        killed = await client.call("POST", "/v1/instances/web/kill", {"signal": 9})
        assert (killed.status, killed.json) == (200, {})
        ended = (await client.call("GET", "/v1/instances/web/wait")).json
        assert ended == {"finished": True, "exit_code": 137, "reason": "killed by SIGKILL"}
        assert (await client.call("POST", "/v1/instances/web/kill", {})).status == 409


@virtual
async def test_create_without_start(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        body = {"start": False, "spec": {"image": "app"}}
        made = await client.call("POST", "/v1/instances", body, headers=WAIT)
        assert made.json["verb"] == "instance.create"
        assert world.instance(made.json["result"]["name"]).status.phase == "created"
        waited = await client.call("GET", f"/v1/instances/{made.json['result']['id']}/wait")
        assert waited.json == {"finished": True}


@virtual
async def test_a_failure_is_told_in_the_operation(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        failed = await run(client, image="nowhere")
        assert (failed.status, failed.json["state"]) == (202, "failed")
        assert failed.json["error"]["code"] == "not_found"
        assert "nowhere" in failed.json["error"]["message"]


@virtual
async def test_logs(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        await run(client, command=("ok",))
        line = LogLine(time="2026-01-01T00:00:00.000000000Z", stream="stdout", line="hello")
        log = tmp_path / "state/instances" / world.instance().id / "log"
        log.write_text(f"{line.time} stdout F hello\n{line.time} stderr F world\n")
        answer = await client.call("GET", "/v1/instances/web/logs")
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert [json.loads(text)["line"] for text in answer.body.splitlines()] == ["hello", "world"]
        tail = await client.call("GET", "/v1/instances/web/logs", tail="1", follow="true")
        assert [json.loads(text)["stream"] for text in tail.body.splitlines()] == ["stderr"]
        wrong: tuple[dict[str, Any], ...] = ({"tail": "-1"}, {"tail": "x"}, {"follow": "maybe"}, {"since": "today"})
        for query in wrong:
            assert (await client.call("GET", "/v1/instances/web/logs", **query)).code == "invalid"


@virtual
async def test_stats_of_what_does_not_run(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await run(client, command=("ok",))
        await client.call("GET", "/v1/instances/web/wait")
        answer = await client.call("GET", "/v1/instances/web/stats")
        assert (answer.status, answer.code) == (409, "conflict")
        assert "alveole start web" in answer.json["error"]["hint"]


@virtual
async def test_images(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        pulled = await client.call("POST", "/v1/images/pull", {"reference": "app"}, headers=WAIT)
        assert (pulled.json["state"], pulled.json["result"]["name"]) == ("done", "app:latest")
        assert pulled.json["result"]["digest"].startswith("sha256:")
        imported = {"name": "mine", "path": "/tmp/x.tar", "format": "oci-layout"}
        assert (await client.call("POST", "/v1/images/import", imported, headers=WAIT)).json["state"] == "done"
        build = {"name": "built", "recipe": {"base": "scratch", "command": ["serve"]}, "directory": "/tmp"}
        assert (await client.call("POST", "/v1/images/build", build, headers=WAIT)).json["state"] == "done"
        listed = (await client.call("GET", "/v1/images")).json["items"]
        assert [image["name"].rsplit("/", 1)[-1] for image in listed] == ["app:latest", "built:latest", "mine:latest"]
        for spelling in ("app", "app:latest", "docker.io/library/app", "library/app:latest"):
            assert (await client.call("GET", f"/v1/images/{spelling}")).json["content"]["size_bytes"] == 1000
        removed = await client.call("DELETE", "/v1/images/library/app", headers=WAIT)
        assert removed.json["state"] == "done"
        assert (await client.call("GET", "/v1/images/app")).code == "not_found"
        assert (await client.call("GET", "/v1/images/Not an image")).code == "invalid"


@virtual
async def test_networks(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        made = await client.call("POST", "/v1/networks", {"name": "net", "internal": True})
        assert (made.status, made.json["state"]) == (202, "done")
        chosen = await client.call("POST", "/v1/networks", {"name": "mine", "subnet": "10.64.200.0/24"})
        assert chosen.json["result"] == {"name": "mine", "subnet": "10.64.200.0/24"}
        shown = (await client.call("GET", "/v1/networks/net")).json
        assert (shown["name"], shown["internal"]) == ("net", True)
        names = [network["name"] for network in (await client.call("GET", "/v1/networks")).json["items"]]
        assert names == ["mine", "net"]
        taken = {"name": "net"}, {"name": "host"}, {"name": "none"}
        for body in taken:
            assert (await client.call("POST", "/v1/networks", body)).code == "exists"
        for body in ({"name": "x", "subnet": "10.64.200.128/25"}, {"name": "x", "subnet": "nonsense"}, {"name": "X"}):
            assert (await client.call("POST", "/v1/networks", body)).code == "invalid"
        assert (await client.call("DELETE", "/v1/networks/net")).json["state"] == "done"
        assert (await client.call("DELETE", "/v1/networks/net")).code == "not_found"


@virtual
async def test_volumes(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        made = await client.call("POST", "/v1/volumes", {"name": "data", "size_bytes": 1 << 30}, headers=WAIT)
        assert made.json["state"] == "done"
        assert (await client.call("GET", "/v1/volumes/data")).json["size_bytes"] == 1 << 30
        default = await client.call("POST", "/v1/volumes", {"name": "other"}, headers=WAIT)
        assert default.json["state"] == "done"
        listed = (await client.call("GET", "/v1/volumes")).json["items"]
        assert [(volume["name"], volume["size_bytes"]) for volume in listed] == [("data", 1 << 30), ("other", 10 << 30)]
        assert (await client.call("POST", "/v1/volumes", {"name": "data"})).code == "exists"
        assert (await client.call("POST", "/v1/volumes", {"name": "tiny", "size_bytes": 1})).code == "invalid"
        assert (await client.call("DELETE", "/v1/volumes/data", headers=WAIT)).json["state"] == "done"
        assert (await client.call("GET", "/v1/volumes/data")).code == "not_found"


@virtual
async def test_operations(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        world.images.gate.clear()
        begun = await client.call("POST", "/v1/images/pull", {"reference": "app"})
        assert (begun.status, begun.json["state"]) == (202, "running")
        identifier = begun.json["id"]
        assert (await client.call("GET", f"/v1/operations/{identifier}")).json["state"] == "running"
        waited = await client.call("GET", f"/v1/operations/{identifier}/wait", timeout_s="1")
        assert waited.json["state"] == "running"
        cancelled = await client.call("POST", f"/v1/operations/{identifier}/cancel")
        assert (cancelled.status, cancelled.json["state"]) == (202, "cancelled")
        assert (await client.call("POST", f"/v1/operations/{identifier}/cancel")).status == 409
        assert [o["id"] for o in (await client.call("GET", "/v1/operations")).json["items"]] == [identifier]
        assert (await client.call("GET", "/v1/operations/nothing")).code == "not_found"


@virtual
async def test_the_daemon_itself(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        told = (await client.call("GET", "/v1/version")).json
        assert told == {"version": "0.0.0", "api": "v1", "store": world.store.id, "node": "node-1"}
        nodes = (await client.call("GET", "/v1/nodes")).json["items"]
        assert [(node["name"], node["isolations"]) for node in nodes] == [("node-1", ["container", "sandbox", "vm"])]
        described = (await client.call("GET", "/v1/openapi.json")).json
        assert described["openapi"] == "3.1.0"
        assert sum(len(methods) for methods in described["paths"].values()) == len(ROUTES)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
@virtual
async def test_a_project_that_cannot_be_is_refused(route: Any, tmp_path: Path) -> None:
    """Everywhere the same, whether it reads or writes."""
    bodies = {
        "/instances": {"spec": {"image": "app"}},
        "/images/pull": {"reference": "app"},
        "/images/import": {"name": "a", "path": "/x", "format": "rootfs"},
        "/images/build": {"name": "a", "recipe": {"base": "scratch"}, "directory": "/"},
        "/networks": {"name": "n"},
        "/volumes": {"name": "v"},
    }
    path = route.path.replace("{ref}", "web").replace("{id}", "1").replace("{name}", "n").replace("{name:path}", "n")
    async with serving(tmp_path) as (_, client):
        body = bodies.get(route.path) if route.method == "POST" else None
        answer = await client.call(route.method, f"/v1{path}", body, project="a/b")
        assert (answer.status, answer.code, answer.json["error"]["field"]) == (400, "invalid", "project")
