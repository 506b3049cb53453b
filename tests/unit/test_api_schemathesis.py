"""Requests made from the description: none makes the daemon fail, and every answer is as described."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from alveole.api.app import ROUTES, make_app
from alveole.api.openapi import describe
from tests.asgi import Client
from tests.control_world import living
from tests.virtual import VirtualLoop

ENDLESS = {"/events"}  # tested by test_api_events.py
SCHEMA = schemathesis.openapi.from_dict(describe(ROUTES, "v1"))
OPERATIONS = [
    SCHEMA[f"/v1{route.path.replace(':path', '')}"][route.method] for route in ROUTES if route.path not in ENDLESS
]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 15


class Served:
    """The application in virtual time, which passes only while a request is under way."""

    def __init__(self, runner: asyncio.Runner, client: Client) -> None:
        self._runner, self._client = runner, client

    def send(self, case: Case[Any]) -> Response:
        request = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
        answer = self._runner.run(self._client.request(request))
        headers = {name: [value] for name, value in answer.headers.items()}
        return Response(answer.status, headers, answer.body, request, elapsed=0.0, verify=False)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        here = living(tmp_path_factory.mktemp("world"))
        world = runner.run(here.__aenter__())
        runner.run(world.run("web"))
        runner.run(world.run("ended", ("ok",)))
        yield Served(runner, Client(make_app(world.service())))
        runner.run(here.__aexit__(None, None, None))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_any_request(operation: Any, served: Served) -> None:
    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=data.draw(st.sampled_from(GenerationMode))))
        case.validate_response(served.send(case), checks=CHECKS)

    check()


def test_the_description_is_valid() -> None:
    """By the meta-schema of OpenAPI 3.1."""
    SCHEMA.validate()
