"""`alveole volume`."""

from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import complete_instances, format_option, inspect_each, quiet_option, record_format_option
from alveole.cli.progress import finish
from alveole.cli.values import size_bytes

_VOLUMES = click.argument("volumes", metavar="VOLUME...", nargs=-1, required=True)


@click.group()
def command() -> None:
    """Create and remove volumes, and give them to running instances."""


@command.command("ls")
@quiet_option
@format_option
def list_volumes(quiet: bool, form: str) -> None:
    """List volumes.

    \b
    Example:
      alveole volume ls
    """
    found = client().volumes()
    if quiet:
        for volume in found:
            output.line(volume["name"])
    elif form == "table":
        rows = (
            (v["name"], output.size(v["size_bytes"]), v.get("phase", "ready"), output.age(v["created_at"]))
            for v in found
        )
        output.table(("NAME", "SIZE", "STATE", "AGE"), rows)
    else:
        output.records(found, form)


@command.command()
@click.option("-s", "--size", metavar="SIZE", help="How much it can hold, such as 20g; 10g if not given.")
@click.argument("name")
def create(name: str, size: str | None) -> None:
    """Create a volume: a disk with a file system, kept apart from any instance.

    \b
    Examples:
      alveole volume create data --size 20g
      alveole run -d -v data:/var/lib/postgresql --name db postgres
    """
    wanted = None if size is None else size_bytes("--size", size)

    def submit(wait_s: float) -> dict[str, Any]:
        return client().create_volume(name, size_bytes=wanted, wait_s=wait_s)

    finish(client(), submit)
    output.line(name)


@command.command("rm")
@_VOLUMES
def remove(volumes: tuple[str, ...]) -> None:
    """Remove volumes that no instance uses, with all they hold.

    \b
    Example:
      alveole volume rm data
    """

    def drop(name: str) -> None:
        finish(client(), lambda wait_s: client().remove_volume(name, wait_s=wait_s))
        output.line(name)

    each(volumes, drop)


@command.command()
@record_format_option
@_VOLUMES
def inspect(volumes: tuple[str, ...], form: str) -> None:
    """Show all that is known of volumes, as a list.

    \b
    Example:
      alveole volume inspect data
    """
    inspect_each(volumes, client().volume, form)


@command.command("attach")
@click.option("--read-only", is_flag=True, help="The instance cannot write it.")
@click.argument("volume")
@click.argument("instance", shell_complete=complete_instances)
@click.argument("target")
def attach(volume: str, instance: str, target: str, read_only: bool) -> None:
    """Mount a volume at TARGET in a running vm. It stays after a restart; it is made if there is none.

    \b
    Example:
      alveole volume attach data web /srv/data
    """
    if not target.startswith("/"):
        raise click.UsageError(f"TARGET {target!r}: not absolute; valid: a path that begins with /")
    finish(
        client(),
        lambda wait_s: client().attach_volume(volume, instance, target, read_only=read_only, wait_s=wait_s),
    )
    output.line(volume)


@command.command("detach")
@click.argument("volume")
@click.argument("instance", shell_complete=complete_instances)
def detach(volume: str, instance: str) -> None:
    """Unmount a volume from a running vm that does not use it.

    \b
    Example:
      alveole volume detach data web
    """
    finish(client(), lambda wait_s: client().detach_volume(volume, instance, wait_s=wait_s))
    output.line(volume)
