"""`alveole copy`."""

import click

from alveole.cli import output
from alveole.cli.context import client
from alveole.cli.options import instance_argument
from alveole.cli.progress import finish


@click.command()
@instance_argument
@click.argument("name")
def command(instance: str, name: str) -> None:
    """Make a new instance with the files and volumes of another, running or not, and start it.

    NAME gets an address of its own and no published ports; of each volume it gets a copy, NAME-VOLUME. For a copy with
    memory and processes see `alveole fork`.

    \b
    Example:
      alveole copy db db-test
    """
    kept = finish(client(), lambda wait_s: client().create_snapshot(instance, wait_s=wait_s))["result"]["name"]
    try:
        finish(client(), lambda wait_s: client().fork_snapshot(kept, name=name, wait_s=wait_s))
    finally:
        finish(client(), lambda wait_s: client().remove_snapshot(kept, wait_s=wait_s))
    output.line(name)
