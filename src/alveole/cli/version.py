"""`alveole version`."""

import click

import alveole
from alveole.cli import output
from alveole.cli.context import client, leave, report
from alveole.cli.options import format_option
from alveole.client.errors import ApiError


@click.command()
@format_option
def command(form: str) -> None:
    """Show the versions of the command line and of the daemon.

    \b
    Example:
      alveole version
    """
    versions = {"client": {"version": alveole.__version__}}
    failure = None
    try:
        versions["daemon"] = client().version()
    except ApiError as error:
        failure = error
    if form == "table":
        rows = [(part, key, str(value)) for part, said in versions.items() for key, value in said.items()]
        output.table(("PART", "WHAT", "VALUE"), rows)
    else:
        output.records(versions, form)
    if failure:
        report(failure)
        leave(1)
