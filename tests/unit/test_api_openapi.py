"""The description of the API is current, whole, and says what the daemon does."""

import json
from typing import Any

from alveole.api.app import ROUTES
from alveole.api.openapi import describe
from tools import gen_openapi


def test_the_page_is_current() -> None:
    """Run ``python tools/gen_openapi.py`` after a change of the API."""
    assert gen_openapi.PAGE.read_text() == gen_openapi.page()


def test_every_reference_leads_somewhere() -> None:
    described = describe(ROUTES, "v1")
    names = set(described["components"]["schemas"])
    assert {reference.rsplit("/", 1)[-1] for reference in references(described)} <= names


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_every_operation_has_its_own_name_and_its_errors() -> None:
    operations = [o for path in describe(ROUTES, "v1")["paths"].values() for o in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(ROUTES)
    assert all("default" in operation["responses"] for operation in operations)
    assert all(operation["summary"] for operation in operations)


def test_requests_are_closed() -> None:
    """What the daemon refuses, the description refuses."""
    schemas = json.loads(gen_openapi.page())["components"]["schemas"]
    for route in ROUTES:
        if route.body is not None:
            assert schemas[route.body.__name__]["additionalProperties"] is False
