"""`alveole ls`."""

import click

from alveole.cli.listing import list_instances, listing_options


@click.command()
@listing_options
def command(form: str, quiet: bool, filters: tuple[str, ...]) -> None:
    """List all instances.

    \b
    Examples:
      alveole ls
      alveole ls --filter label=tier=web --filter isolation=sandbox
      alveole rm -f $(alveole ls -q)
    """
    list_instances(form, filters, quiet=quiet, everything=True)
