"""`alveole ps`."""

import click

from alveole.cli.listing import list_instances, listing_options


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Those that do not run too, as `alveole ls` does.")
@listing_options
def command(form: str, quiet: bool, filters: tuple[str, ...], everything: bool) -> None:
    """List running instances.

    \b
    Examples:
      alveole ps
      alveole ps -a --format json
    """
    list_instances(form, filters, quiet=quiet, everything=everything)
