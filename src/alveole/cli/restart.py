"""`alveole restart`."""

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import grace_option, instances_argument
from alveole.cli.progress import finish


@click.command()
@grace_option
@instances_argument
def command(instances: tuple[str, ...], grace_s: float | None) -> None:
    """Stop instances and start them again.

    \b
    Examples:
      alveole restart web
      alveole restart -t 0 web db
    """

    def restart(name: str) -> None:
        finish(client(), lambda wait_s: client().restart_instance(name, grace_s=grace_s, wait_s=wait_s))
        output.line(name)

    each(instances, restart)
