"""Options and arguments that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from alveole.cli.context import each, globals_of

Function = TypeVar("Function", bound=Callable[..., Any])

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print names or ids only.")
format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How to print.",
)
record_format_option = click.option(
    "--format", "form", type=click.Choice(["json", "yaml"]), default="json", show_default=True, help="How to print."
)


def complete_instances(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names for the shell; none where the daemon does not answer."""
    from alveole.client.errors import ApiError

    try:
        found = globals_of(context).client().instances()
    except ApiError:
        return []
    return [instance["name"] for instance in found if instance["name"].startswith(incomplete)]


def instances_argument(function: Function) -> Function:
    return click.argument(
        "instances", metavar="INSTANCE...", nargs=-1, required=True, shell_complete=complete_instances
    )(function)


def instance_argument(function: Function) -> Function:
    return click.argument("instance", shell_complete=complete_instances)(function)


def _seconds(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    from alveole.cli.values import duration_s

    return None if value is None else duration_s("--time", value)


grace_option = click.option(
    "-t",
    "--time",
    "grace_s",
    metavar="SECONDS",
    callback=_seconds,
    help="How long each may take to end before it is killed; as its spec says if not given.",
)


def inspect_each(names: tuple[str, ...], read: Callable[[str], dict[str, Any]], form: str) -> None:
    """Print those that are there, and say which are not."""
    from alveole.cli import output

    found: list[dict[str, Any]] = []
    try:
        each(names, lambda name: found.append(read(name)))
    finally:
        output.records(found, form)
