"""`alveole operation`."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import format_option, quiet_option

_HEAD = ("id", "verb", "target", "state", "created_at", "finished_at", "progress")


@click.group()
def command() -> None:
    """Look into what was asked for, and cancel it."""


@command.command("ls")
@quiet_option
@format_option
def list_operations(quiet: bool, form: str) -> None:
    """List operations, the newest last.

    \b
    Example:
      alveole operation ls
    """
    found = client().operations()
    if quiet:
        for operation in found:
            output.line(operation["id"])
    elif form == "table":
        output.table(("ID", "VERB", "TARGET", "STATE", "AGE", "TOOK MS", "ERROR"), map(_row, found))
    else:
        output.records(found, form)


def _row(operation: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        operation["id"],
        operation["verb"],
        operation["target"],
        operation["state"],
        output.age(operation["created_at"]),
        took_ms(operation),
        operation.get("error", {}).get("message", ""),
    )


def took_ms(operation: Mapping[str, Any]) -> str:
    """From its creation to its end; empty while it runs."""
    if "finished_at" not in operation:
        return ""
    began, ended = (datetime.fromisoformat(operation[name]) for name in ("created_at", "finished_at"))
    return f"{(ended - began).total_seconds() * 1000:.1f}"


@command.command()
@format_option
@click.argument("operation_id", metavar="OPERATION")
def show(operation_id: str, form: str) -> None:
    """Show an operation: its steps, what each took, and its outcome.

    \b
    Example:
      alveole operation show $(alveole operation ls -q | tail -1)
    """
    operation = client().operation(operation_id)
    if form != "table":
        output.records(operation, form)
        return
    for name in _HEAD:
        if operation.get(name):
            output.line(f"{name.removesuffix('_at'):<9} {output.printable(str(operation[name]))}")
    if took := took_ms(operation):
        output.line(f"{'took':<9} {took} ms")
    for name in ("message", "hint"):
        if operation.get("error", {}).get(name):
            output.line(f"{'error' if name == 'message' else name:<9} {output.printable(operation['error'][name])}")
    if operation.get("steps"):
        output.line()
        output.table(("STEP", "MS", "DETAIL"), map(_step_row, operation["steps"]))


def _step_row(step: Mapping[str, Any]) -> tuple[str, ...]:
    duration_ms = step.get("duration_ms")
    took = "under way" if duration_ms is None else f"{duration_ms:.1f}"
    return step["name"], took, step.get("detail", "")


@command.command()
@click.argument("operations", metavar="OPERATION...", nargs=-1, required=True)
def cancel(operations: tuple[str, ...]) -> None:
    """Cancel operations that run. What they had done is undone.

    \b
    Example:
      alveole operation cancel 01J8Z3
    """

    def end(identity: str) -> None:
        client().cancel_operation(identity)
        output.line(identity)

    each(operations, end)
