"""`alveole stop`."""

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import grace_option, instances_argument
from alveole.cli.progress import finish


@click.command()
@grace_option
@instances_argument
def command(instances: tuple[str, ...], grace_s: float | None) -> None:
    """Stop instances: signal, wait, then kill.

    \b
    Examples:
      alveole stop web
      alveole stop -t 0 web db
    """

    def stop(name: str) -> None:
        finish(client(), lambda wait_s: client().stop_instance(name, grace_s=grace_s, wait_s=wait_s))
        output.line(name)

    each(instances, stop)
