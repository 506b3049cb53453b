"""`alveole recreate`."""

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import instances_argument
from alveole.cli.progress import finish


@click.command()
@instances_argument
def command(instances: tuple[str, ...]) -> None:
    """Begin instances anew from their images: files, memory and processes.

    Name, address, ports and volumes stay. What runs is killed without grace: for a compromised or broken instance.

    \b
    Example:
      alveole recreate web
    """

    def one(name: str) -> None:
        finish(client(), lambda wait_s: client().recreate_instance(name, wait_s=wait_s))
        output.line(name)

    each(instances, one)
