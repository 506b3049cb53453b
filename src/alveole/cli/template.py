"""`alveole template`."""

from collections.abc import Mapping
from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import format_option, inspect_each, quiet_option, record_format_option
from alveole.cli.progress import finish

_COLUMNS = ("KEY", "MEMORY", "CPUS", "ACCEL", "KERNEL", "QEMU", "SIZE", "INSTANCES", "AGE", "USED", "STATE")
_TEMPLATES = click.argument("templates", metavar="KEY...", nargs=-1, required=True)


@click.group()
def command() -> None:
    """Show what vms go on from in place of booting, remove it, make it afresh.

    A template is made when the first vm of its shape (memory, processors, accelerator, terminal or not) is started. A
    KEY may be shortened as long as it is unique.
    """


@command.command("ls")
@quiet_option
@format_option
def list_templates(quiet: bool, form: str) -> None:
    """List templates.

    INSTANCES run and share its memory: they went on from it, or from an instance that did. A template that is
    unchecked is compared with what was written when a vm next goes on from it, and made anew if it is damaged.

    \b
    Example:
      alveole template ls
    """
    found = client().templates()
    if quiet:
        for template in found:
            output.line(template["key"])
    elif form == "table":
        output.table(_COLUMNS, map(_row, found))
    else:
        output.records(found, form)


def _row(template: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        template["key"],
        output.size(template["memory_bytes"]),
        str(template["cpus"]),
        template["accelerator"],
        template["kernel"],
        template["qemu"].partition(" ")[0],
        output.size(template["size_bytes"]),
        str(template["instances"]),
        output.age(template["created_at"]),
        f"{output.age(template['used_at'])} ago",
        _state(template),
    )


def _state(template: Mapping[str, Any]) -> str:
    state = "ready" if template["checked"] else "unchecked"
    return f"{state} (made anew: was damaged)" if template["cause"] == "damaged" else state


@command.command()
@record_format_option
@_TEMPLATES
def inspect(templates: tuple[str, ...], form: str) -> None:
    """Show all that is known of templates, as a list.

    \b
    Example:
      alveole template inspect 3f2a
    """
    inspect_each(templates, client().template, form)


@command.command("rm")
@click.option("--unused", is_flag=True, help="All that no running instance shares memory with.")
@click.argument("templates", metavar="[KEY]...", nargs=-1)
def remove(templates: tuple[str, ...], unused: bool) -> None:
    """Remove templates. Instances that go on from them notice nothing; the next vm of that shape boots.

    \b
    Examples:
      alveole template rm 3f2a
      alveole template rm --unused
    """
    if bool(templates) == unused:
        raise click.UsageError("give either KEYs or --unused")
    each(templates if templates else [one["key"] for one in client().templates() if not one["instances"]], _remove)


def _remove(key: str) -> None:
    removed = finish(client(), lambda wait_s: client().remove_template(key, wait_s=wait_s))
    output.line(_key(removed))
    if held_bytes := removed["result"].get("held_bytes"):
        output.note(f"{output.size(held_bytes)} are given back when the instances have ended that go on from it")


def _key(operation: Mapping[str, Any]) -> str:
    """The whole of it, of which the beginning was given."""
    return str(operation["target"].partition("/")[2])


@command.command()
@_TEMPLATES
def refresh(templates: tuple[str, ...]) -> None:
    """Make templates afresh. Instances keep the memory of the old one, which others go on from until then.

    \b
    Example:
      alveole template refresh 3f2a
    """

    def renew(key: str) -> None:
        output.line(_key(finish(client(), lambda wait_s: client().refresh_template(key, wait_s=wait_s))))

    each(templates, renew)
