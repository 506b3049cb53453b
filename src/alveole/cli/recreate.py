"""`alveole recreate`."""

from datetime import UTC, datetime
from functools import partial
from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import instances_argument
from alveole.cli.progress import finish
from alveole.client.errors import ApiError


@click.command()
@click.option("--keep-evidence", is_flag=True, help="Keep what each is now in a snapshot first, NAME-evidence-TIME.")
@instances_argument
def command(instances: tuple[str, ...], keep_evidence: bool) -> None:
    """Begin instances anew from their images: files, memory and processes.

    Name, address, ports and volumes stay. What runs is killed without grace: for a compromised or broken instance.
    Evidence is looked into by `alveole snapshot diff` and `alveole snapshot fork`, and holds memory where that can be
    kept: of a running vm or sandbox.

    \b
    Examples:
      alveole recreate web
      alveole recreate --keep-evidence web
    """

    def one(name: str) -> None:
        if keep_evidence:
            _keep(name)
        finish(client(), lambda wait_s: client().recreate_instance(name, wait_s=wait_s))
        output.line(name)

    each(instances, one)


def _keep(name: str) -> None:
    """Raises ApiError, so that what cannot be kept is not recreated either."""
    evidence = f"{client().instance(name)['name'][:30]}-evidence-{datetime.now(tz=UTC):%Y%m%d-%H%M%S}"

    def submit(wait_s: float, *, memory: bool) -> dict[str, Any]:
        return client().create_snapshot(name, name=evidence, memory=memory, wait_s=wait_s)

    try:
        finish(client(), partial(submit, memory=True))
    except ApiError as error:
        if error.code != "conflict":
            raise
        finish(client(), partial(submit, memory=False))  # its memory cannot be kept
    output.note(f"evidence: {evidence}")
