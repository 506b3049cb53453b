"""`alveole create`."""

from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client
from alveole.cli.interactive import terminal_options
from alveole.cli.progress import finish
from alveole.cli.specoptions import given_spec, spec_options


@click.command(context_settings={"allow_interspersed_args": False})
@terminal_options
@spec_options
def command(**options: Any) -> None:
    """Create an instance without starting it.

    \b
    Examples:
      alveole create --name web -p 8080:80 nginx
      alveole start web
    """
    spec = given_spec(options)

    def submit(wait_s: float) -> dict[str, Any]:
        return client().create_instance(spec, name=options["name"], start=False, wait_s=wait_s)

    output.line(finish(client(), submit)["result"]["id"])
