"""`alveole wake`."""

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import instances_argument
from alveole.cli.progress import finish


@click.command()
@instances_argument
def command(instances: tuple[str, ...]) -> None:
    """Let sleeping instances go on where they were.

    \b
    Example:
      alveole wake web
    """

    def one(name: str) -> None:
        finish(client(), lambda wait_s: client().start_instance(name, wait_s=wait_s))
        output.line(name)

    each(instances, one)
