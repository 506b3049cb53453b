"""Recipes: from TOML to the model, with errors that name the field and what was probably meant."""

import difflib
import tomllib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from alveole.model.error import AlveoleError, invalid
from alveole.model.health import HealthCheck
from alveole.model.image import Recipe, RecipeFile

_TABLES: Mapping[str, type[BaseModel]] = {"files": RecipeFile, "health": HealthCheck}
_REFERENCE = "docs/reference/recipes.md describes every key"


def parse_recipe(text: str, source: str) -> Recipe:
    """Read a recipe; ``source`` is what errors call it, usually its path.

    Raises AlveoleError(INVALID) naming the line (bad TOML) or the field (unknown key, wrong value).
    """
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise invalid(f"{source} is not TOML: {error}", field=source) from error
    return check_recipe(data, source)


def check_recipe(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from its parsed TOML or JSON. Raises AlveoleError(INVALID) naming the field."""
    try:
        return Recipe.model_validate(data, extra="forbid")
    except ValidationError as error:
        raise _first_problem(error, source) from error


def _first_problem(error: ValidationError, source: str) -> AlveoleError:
    """Unknown keys first: a misspelt key is why a required one is missing."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return invalid(f"{source}: unknown key {field!r}", hint=_nearest(problem["loc"]), field=field)
    message = problem["msg"].removeprefix("Value error, ")
    return invalid(f"{source}: {field or 'recipe'}: {message}", hint=_REFERENCE, field=field)


def _nearest(location: tuple[int | str, ...]) -> str:
    table = _TABLES.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
    close = difflib.get_close_matches(str(location[-1]), table.model_fields, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(table.model_fields)}"
