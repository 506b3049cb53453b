"""Reading what clients send: an unknown field is an error that names the nearest valid one."""

import difflib
import json
from datetime import datetime
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from alveole.model.error import AlveoleError, ErrorCode, invalid

MAX_BODY_BYTES = 1 << 20
M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, model: type[M]) -> tuple[M, Any]:
    """The body as a model, and as JSON. Raises INVALID naming the field."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise invalid(f"the request body is larger than {MAX_BODY_BYTES} bytes")
    try:
        raw = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise invalid(f"the request body is not JSON: {error}") from error
    return validate(model, raw), raw


def validate(model: type[M], raw: Any) -> M:
    """Raises INVALID for the first thing that is wrong, naming its field."""
    try:
        return model.model_validate(raw, extra="forbid")
    except ValidationError as error:
        raise explain(model, error) from error


def explain(model: type[BaseModel], error: ValidationError) -> AlveoleError:
    problems = error.errors(include_url=False, include_context=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt field is also missing
    field = _dotted(first["loc"])
    if first["type"] != "extra_forbidden":
        said = first["msg"].removeprefix("Value error, ")
        return AlveoleError(ErrorCode.INVALID, f"{field or 'body'}: {said}", field=field)
    name = str(first["loc"][-1])
    valid = sorted(_fields_at(model, first["loc"][:-1]))
    near = difflib.get_close_matches(name, valid, 1)
    hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(valid)}"
    return AlveoleError(ErrorCode.INVALID, f"{field} is not a field", hint=hint, field=field)


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """The field names of the model found by following ``location`` from ``model``."""
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        current = _model_in(current.model_fields[part].annotation)
    return set(current.model_fields)


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)


def query_number(request: Request, name: str, default: float, most: float) -> float:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        raise invalid(f"{name}={text!r} is not a number", field=name) from None
    if not 0 <= number <= most:
        raise invalid(f"{name}={text} is not between 0 and {most:g}", field=name)
    return number


def query_time(request: Request, name: str) -> str | None:
    text = request.query_params.get(name)
    try:
        if text is not None:
            datetime.fromisoformat(text)
    except ValueError:
        raise invalid(f"{name}={text!r} is not a time", hint="such as 2026-01-31T12:00:00Z", field=name) from None
    return text


def query_flag(request: Request, name: str) -> bool:
    text = request.query_params.get(name, "false").lower()
    if text not in {"true", "false", "1", "0"}:
        raise invalid(f"{name}={text!r} is not true or false", field=name)
    return text in {"true", "1"}
