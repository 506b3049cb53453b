"""What clients may send: bodies are strict, headers and queries mean what they say, and every error is one JSON."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from alveole.api import system
from alveole.api.errors import STATUS
from alveole.api.service import Service
from alveole.api.strict import MAX_BODY_BYTES
from alveole.control.cache import Cache
from alveole.model.error import AlveoleError, ErrorCode
from tests.unit.test_api_routes import WAIT, run, serving
from tests.virtual import virtual

GOOD = {"image": "app", "command": ["serve"]}
CONTRACT = {
    "invalid": 400,
    "denied": 403,
    "not_found": 404,
    "exists": 409,
    "conflict": 409,
    "gone": 410,
    "cancelled": 499,
    "internal": 500,
    "unsupported": 501,
    "unavailable": 503,
    "timeout": 504,
    "exhausted": 507,
}


def test_the_error_table_is_the_contract() -> None:
    assert {code.value: status for code, status in STATUS.items()} == CONTRACT
    assert set(STATUS) == set(ErrorCode)


@pytest.mark.parametrize(
    ("spec", "field", "hint"),
    [
        ({**GOOD, "comand": []}, "spec.comand", "did you mean command?"),
        ({**GOOD, "restart": {"polcy": "no"}}, "spec.restart.polcy", "did you mean policy?"),
        ({**GOOD, "health": {"command": ["x"], "retry": 1}}, "spec.health.retry", "did you mean retries?"),
        (
            {**GOOD, "ports": [{"host_port": 1, "instance_port": 1}, {"host_prt": 1, "instance_port": 2}]},
            "spec.ports[1].host_prt",
            "did you mean host_port?",
        ),
        (
            {**GOOD, "mounts": [{"kind": "bind", "source": "/", "target": "/a", "readonly": True}]},
            "spec.mounts[0].readonly",
            "did you mean read_only?",
        ),
        ({**GOOD, "zzz": 1}, "spec.zzz", "valid are "),
        ({"image": 5}, "spec.image", ""),
        ({}, "spec.image", ""),
        ({**GOOD, "isolation": "jail"}, "spec.isolation", ""),
        ({**GOOD, "env": {"A": 1}}, "spec.env.A", ""),
        ({**GOOD, "resources": {"cpus": 0}}, "spec.resources.cpus", ""),
        ({**GOOD, "stop_grace_s": float("inf")}, "spec.stop_grace_s", ""),
        ({**GOOD, "health": {"command": ["x"], "interval_s": float("inf")}}, "spec.health.interval_s", ""),
        ({**GOOD, "health": {"command": ["x"], "interval_s": float("nan")}}, "spec.health.interval_s", ""),
        ({**GOOD, "network": "host", "ports": [{"host_port": 1, "instance_port": 1}]}, "spec.ports", ""),
    ],
)
@virtual
async def test_a_wrong_spec_names_its_field(spec: dict[str, Any], field: str, hint: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        answer = await client.call("POST", "/v1/instances", {"name": "web", "spec": spec})
        error = answer.json["error"]
        assert (answer.status, error["code"], error["field"]) == (400, "invalid", field)
        assert hint in error["hint"]
        assert not world.records("instances")


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"nonsense",
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"name":' * 50_000,
        b'{"name": "\\ud800", "spec": {"image": "app"}}',
        b'{"\\ud800": 1, "spec": {"image": "app"}}',
        b'{"name": ' + b"9" * 5000 + b"}",
        b'{"spec": {"image": "app", "command": ["' + b"x" * MAX_BODY_BYTES + b'"]}}',
    ],
    ids=lambda raw: repr(raw[:20]),
)
@virtual
async def test_what_is_no_request_is_refused(raw: bytes, tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        answer = await client.call("POST", "/v1/instances", raw=raw)
        assert (answer.status, answer.code) == (400, "invalid")
        assert not world.records("instances")


@virtual
async def test_an_empty_body_is_an_empty_object(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await run(client)
        assert (await client.call("POST", "/v1/instances/web/stop", headers=WAIT)).json["state"] == "done"
        answer = await client.call("POST", "/v1/instances/web/start", {"now": True})
        assert answer.json["error"]["field"] == "now"


@virtual
async def test_grace_is_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await run(client)
        for grace_s in (-1, 3601, "soon"):
            answer = await client.call("POST", "/v1/instances/web/stop", {"grace_s": grace_s})
            assert answer.json["error"]["field"] == "grace_s"


@virtual
async def test_prefer_wait(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        world.images.gate.clear()
        body = {"name": "web", "spec": GOOD}
        before = world.clock.now()
        answer = await client.call("POST", "/v1/instances", body, headers={"Prefer": "respond-async, wait=2.5"})
        assert (answer.status, answer.json["state"]) == (202, "running")
        assert (world.clock.now() - before).total_seconds() == 2.5
        for wrong in ("wait=", "wait=x", "wait=-1", "wait=²", "wait=1.1.1", "wait=inf"):
            refused = await client.call("POST", "/v1/networks", {"name": "n"}, headers={"Prefer": wrong})
            assert (refused.status, refused.code) == (400, "invalid"), wrong
            assert [network.name for network in world.records("networks")] == ["default"], "refused, yet carried out"
        world.images.gate.set()


@virtual
async def test_idempotency_key(tmp_path: Path) -> None:
    async with serving(tmp_path) as (world, client):
        body, key = {"spec": GOOD}, {"Idempotency-Key": "k" * 64}
        first = await client.call("POST", "/v1/instances", body, headers=key)
        again = await client.call("POST", "/v1/instances", body, headers={**key, **WAIT})
        assert again.json["id"] == first.json["id"]
        assert again.json["state"] == "done"
        assert len(world.records("instances")) == 1
        other = await client.call("POST", "/v1/instances", {"spec": GOOD, "start": False}, headers=key)
        assert (other.status, other.code) == (409, "conflict")
        for wrong in ("", "k" * 65, "a/b", "a\x01"):
            refused = await client.call("POST", "/v1/instances", body, headers={"Idempotency-Key": wrong})
            assert refused.code == "invalid", wrong


@virtual
async def test_filters_and_references(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        for name in ("web", "web-2", "db"):
            await run(client, name, labels={"tier": name})
        await client.call("POST", "/v1/instances/web-2/stop", {}, headers=WAIT)

        async def names(*filters: str) -> list[str]:
            answer = await client.call("GET", "/v1/instances", filter_=list(filters))
            return [item["name"] for item in answer.json["items"]]

        assert await names() == ["db", "web", "web-2"]
        assert await names("name=web") == ["web", "web-2"]
        assert await names("name=web", "phase=exited") == ["web-2"]
        assert await names("label=tier=db") == ["db"]
        assert await names("label=tier") == ["db", "web", "web-2"]
        assert (await client.call("GET", "/v1/instances", filter="phase")).code == "invalid"
        assert (await client.call("GET", "/v1/instances", filter="shape=round")).json["error"]["field"] == "filter"
        ambiguous = await client.call("GET", "/v1/instances/we")
        assert (ambiguous.status, ambiguous.code) == (409, "conflict")
        assert "web, web-2" in ambiguous.json["error"]["message"]
        assert (await client.call("GET", "/v1/instances/d")).json["name"] == "db"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("PUT", "/v1/instances", 400, "invalid"),
        ("PATCH", "/v1/instances/web", 400, "invalid"),
        ("GET", "/v1/instances/web", 404, "not_found"),
        ("POST", "/v1/instances/web/start", 404, "not_found"),
        ("GET", "/v1/instances/web/wait", 404, "not_found"),
        ("DELETE", "/v1/networks/x", 404, "not_found"),
        ("DELETE", "/v1/volumes/x", 404, "not_found"),
        ("DELETE", "/v1/images/x", 404, "not_found"),
    ],
)
@virtual
async def test_what_is_not_there(method: str, path: str, status: int, code: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        answer = await client.call(method, path)
        assert (answer.status, answer.code) == (status, code)
        assert set(answer.json["error"]) == {"code", "message", "hint", "field"}


@pytest.mark.parametrize("timeout_s", ["-1", "x", "nan", "inf", "1e9"])
@virtual
async def test_a_wait_is_bounded(timeout_s: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await run(client)
        answer = await client.call("GET", "/v1/instances/web/wait", timeout_s=timeout_s)
        assert answer.json["error"]["field"] == "timeout_s"


@pytest.mark.parametrize("code", ErrorCode)
@virtual
async def test_every_error_becomes_its_status(code: ErrorCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_service: Service, _request: Request) -> Any:
        raise AlveoleError(code, "it failed", hint="try", field="x")

    monkeypatch.setattr(system.ROUTES[0].__class__, "handler", property(lambda _route: fail), raising=False)
    async with serving(tmp_path) as (_, client):
        answer = await client.call("GET", "/v1/version")
        assert answer.status == CONTRACT[code.value]
        assert answer.json == {"error": {"code": code.value, "message": "it failed", "hint": "try", "field": "x"}}


@virtual
async def test_a_fault_shows_no_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_cache: Cache, _name: str) -> Any:
        raise ZeroDivisionError("a secret")

    async with serving(tmp_path) as (_, client):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cache, "table", broken)
            with suppress(ZeroDivisionError):  # told to the server too
                async with client.stream("GET", "/v1/networks") as (head, chunks):
                    body = b"".join([chunk async for chunk in chunks])
        assert head.status == 500
        assert b"secret" not in body
        assert json.loads(body)["error"]["code"] == "internal"
        assert "ZeroDivisionError: a secret" in caplog.text
