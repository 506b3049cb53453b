"""The OpenAPI 3.1 description, made from the routes and the models they name."""

import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from alveole.api.errors import STATUS
from alveole.api.service import Route

_REF = "#/components/schemas/{model}"
_PROJECT = {"name": "project", "in": "query", "schema": {"type": "string", "default": "default"}}
_HEADERS = [
    {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "The same key with the same request returns the first operation again, for a day",
        "schema": {"type": "string", "maxLength": 64},
    },
    {
        "name": "Prefer",
        "in": "header",
        "description": "wait=SECONDS answers when the operation is finished, or when the time has passed",
        "schema": {"type": "string", "pattern": "^wait=[0-9.]+$"},
    },
]


def describe(routes: tuple[Route, ...], version: str) -> dict[str, Any]:
    models = {model for route in routes for model in (route.body, route.answer) if model is not None}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in ordered], ref_template=_REF)
    definitions = {**schemas["$defs"], "Error": _error_schema()}
    paths: dict[str, Any] = {}
    for route in routes:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", f"/v1{route.path}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Alveole", "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": {name: _closed(schema) for name, schema in sorted(definitions.items())}},
    }


def _operation(route: Route) -> dict[str, Any]:
    names = re.findall(r"\{(\w+)(?::\w+)?\}", route.path)
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    parameters.append(_PROJECT)
    for name, kind, meaning in route.query:
        parameters.append({"name": name, "in": "query", "description": meaning, "schema": {"type": kind}})
    if route.status == 202:
        parameters += _HEADERS
    described: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_" + re.sub(r"\W+", "_", route.path).strip("_"),
        "summary": route.summary,
        "parameters": parameters,
        "responses": {str(route.status): _answer(route), "default": _error_answer()},
    }
    if route.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(route.body)}}}
    return described


def _answer(route: Route) -> dict[str, Any]:
    if route.answer is None:
        return {"description": route.summary, "content": {route.media_type: {}}}
    schema: dict[str, Any] = _ref(route.answer)
    if route.listing:
        schema = {
            "type": "object",
            "required": ["items", "revision"],
            "properties": {"items": {"type": "array", "items": schema}, "revision": {"type": "string"}},
        }
    return {"description": route.summary, "content": {route.media_type: {"schema": schema}}}


def _error_answer() -> dict[str, Any]:
    return {"description": "Error", "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}}


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model.__name__)}


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Requests may hold no other fields, and answers hold none."""
    if schema.get("type") == "object" and "properties" in schema:
        return {**schema, "additionalProperties": False}
    return schema


def _error_schema() -> dict[str, Any]:
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message"],
                "properties": {
                    "code": {"enum": [code.value for code in STATUS]},
                    "message": text,
                    "hint": text,
                    "field": text,
                },
            }
        },
    }
