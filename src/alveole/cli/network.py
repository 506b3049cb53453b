"""`alveole network`."""

from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import format_option, inspect_each, quiet_option, record_format_option
from alveole.cli.progress import finish

_NETWORKS = click.argument("networks", metavar="NETWORK...", nargs=-1, required=True)


@click.group()
def command() -> None:
    """Create and remove networks."""


@command.command("ls")
@quiet_option
@format_option
def list_networks(quiet: bool, form: str) -> None:
    """List networks.

    \b
    Example:
      alveole network ls
    """
    found = client().networks()
    if quiet:
        for network in found:
            output.line(network["name"])
    elif form == "table":
        rows = ((n["name"], n["subnet"], _way_out(n), output.age(n["created_at"])) for n in found)
        output.table(("NAME", "SUBNET", "WAY OUT", "AGE"), rows)
    else:
        output.records(found, form)


def _way_out(network: dict[str, Any]) -> str:
    return "no" if network.get("internal") else "yes"


@command.command()
@click.option("--subnet", metavar="PREFIX", help="Its IPv4 addresses, inside the daemon's pool; chosen if not given.")
@click.option("--internal", is_flag=True, help="No way out to other networks or the internet.")
@click.argument("name")
def create(name: str, subnet: str | None, internal: bool) -> None:
    """Create a network: instances on it reach each other, and nothing else reaches them.

    \b
    Examples:
      alveole network create backend --internal
      alveole run -d --network backend --name db postgres
    """

    def submit(wait_s: float) -> dict[str, Any]:
        return client().create_network(name, subnet=subnet, internal=internal, wait_s=wait_s)

    finish(client(), submit)
    output.line(name)


@command.command("rm")
@_NETWORKS
def remove(networks: tuple[str, ...]) -> None:
    """Remove networks that no instance uses.

    \b
    Example:
      alveole network rm backend
    """

    def drop(name: str) -> None:
        finish(client(), lambda wait_s: client().remove_network(name, wait_s=wait_s))
        output.line(name)

    each(networks, drop)


@command.command()
@record_format_option
@_NETWORKS
def inspect(networks: tuple[str, ...], form: str) -> None:
    """Show all that is known of networks, as a list.

    \b
    Example:
      alveole network inspect default
    """
    inspect_each(networks, client().network, form)
