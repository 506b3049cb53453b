"""`alveole wait`."""

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import instances_argument
from alveole.client.errors import ApiError


@click.command()
@instances_argument
def command(instances: tuple[str, ...]) -> None:
    """Wait until instances have ended and print their exit codes.

    \b
    Example:
      alveole wait batch-1 batch-2
    """
    each(instances, _wait)


def _wait(name: str) -> None:
    answer = client().wait_instance(name)
    while not answer["finished"]:
        answer = client().wait_instance(name)
    if "error" in answer:
        raise ApiError.from_record(answer["error"])
    output.line(str(answer.get("exit_code", answer.get("reason", "unknown"))))
