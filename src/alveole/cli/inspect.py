"""`alveole inspect`."""

import click

from alveole.cli.context import client
from alveole.cli.options import inspect_each, instances_argument, record_format_option


@click.command()
@record_format_option
@instances_argument
def command(instances: tuple[str, ...], form: str) -> None:
    """Show all that is known of instances, as a list.

    \b
    Examples:
      alveole inspect web
      alveole inspect --format yaml web db
    """
    inspect_each(instances, client().instance, form)
