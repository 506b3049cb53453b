"""`alveole fork`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client
from alveole.cli.options import instance_argument
from alveole.cli.progress import finish
from alveole.client.errors import ApiError

_MOST = 1000
_SHARED = (
    "note: inside, host name, machine id and SSH host keys are those of {0}, a whole operating system: nothing of "
    "Alveole runs there that could renew them"
)


@click.command()
@click.option("--name", metavar="NAME", help="Of the fork; made of the original's if not given.")
@click.option("--count", metavar="NUMBER", type=click.IntRange(1, _MOST), help="How many forks of the same moment.")
@click.option("--name-prefix", metavar="TEXT", help="Names them TEXT1, TEXT2 and so on.")
@click.option("--paused", is_flag=True, help="Start none of them: they sleep until `alveole wake`.")
@click.option("--new-inside-address", is_flag=True, help="A vm sees its own address, not the one that all see.")
@instance_argument
def command(
    instance: str,
    *,
    name: str | None,
    count: int | None,
    name_prefix: str | None,
    paused: bool,
    new_inside_address: bool,
) -> None:
    """Duplicate a running instance: memory, disk and processes. The original goes on.

    Each fork has an address, host name and machine id of its own; published ports stay with the original, and
    connections that were open are the original's (a sandbox loses them). Only a vm or sandbox without volumes can be
    forked. Forks of a whole operating system keep its names and keys inside.

    \b
    Examples:
      alveole fork web
      alveole fork --count 5 --name-prefix web- web
    """
    if name and (name_prefix or count):
        raise click.UsageError("--name names one fork; with --count give --name-prefix")
    names = [f"{name_prefix}{number}" if name_prefix else name for number in range(1, (count or 1) + 1)]
    ask = partial(client().fork_instance, instance, paused=paused, new_inside_address=new_inside_address)
    first = finish(client(), lambda wait_s: ask(name=names[0], wait_s=wait_s))
    output.line(first["result"]["name"])
    moment = first["result"]["moment"]
    # All are asked for before any is waited for: they are made side by side.
    others = [ask(name=other, moment=moment) for other in names[1:]]
    for operation in others:
        output.line(finish(client(), _waiting(operation))["result"]["name"])
    if _shares_identity(first["result"]["id"]):
        output.note(_SHARED.format(instance))


def _shares_identity(identifier: str) -> bool:
    try:
        found = client().instance(identifier)
    except ApiError as error:
        if error.code == "not_found":  # removed a moment after it was made: nobody is left to be told of
            return False
        raise
    return bool((found["status"].get("machine") or {}).get("shares_identity"))


def _waiting(operation: dict[str, Any]) -> Callable[[float], dict[str, Any]]:
    return lambda wait_s: client().wait_operation(operation["id"], timeout_s=wait_s)
