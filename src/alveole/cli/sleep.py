"""`alveole sleep`."""

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import instances_argument
from alveole.cli.progress import finish


@click.command()
@instances_argument
def command(instances: tuple[str, ...]) -> None:
    """Put running instances on disk, memory and processes included.

    All they use is given back; `alveole wake` lets them go on where they were, also after a reboot of the host. Only a
    vm or sandbox without shared directories can sleep.

    \b
    Example:
      alveole sleep web
    """

    def one(name: str) -> None:
        finish(client(), lambda wait_s: client().sleep_instance(name, wait_s=wait_s))
        output.line(name)

    each(instances, one)
