"""`alveole rm`."""

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import instances_argument
from alveole.cli.progress import finish


@click.command()
@click.option("-f", "--force", is_flag=True, help="Also those that run: they are killed.")
@instances_argument
def command(instances: tuple[str, ...], force: bool) -> None:
    """Remove instances. Their volumes stay.

    \b
    Examples:
      alveole rm web
      alveole rm -f $(alveole ls -q)
    """

    def remove(name: str) -> None:
        finish(client(), lambda wait_s: client().remove_instance(name, force=force, wait_s=wait_s))
        output.line(name)

    each(instances, remove)
