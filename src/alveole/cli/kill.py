"""`alveole kill`."""

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import instances_argument
from alveole.cli.values import signal_value


@click.command()
@click.option("-s", "--signal", "sent", default="SIGKILL", show_default=True, help="A signal's name or number.")
@instances_argument
def command(instances: tuple[str, ...], sent: str) -> None:
    """Send a signal to the first process of instances.

    \b
    Examples:
      alveole kill web
      alveole kill -s HUP web
    """

    def kill(name: str) -> None:
        client().kill_instance(name, signal_value(sent))
        output.line(name)

    each(instances, kill)
