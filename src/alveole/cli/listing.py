"""The list of instances, as `ls` and `ps` print it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client
from alveole.cli.options import Function, format_option, quiet_option

_FILTERS = "name, id, phase, isolation, image, network, label, health"
_COLUMNS = ("NAME", "ID", "IMAGE", "STATUS", "ISOLATION", "ADDRESS", "PORTS")
_ALIVE = frozenset({"running", "backoff"})


def listing_options(function: Function) -> Function:
    decorated: Callable[..., Any] = click.option(
        "-f", "--filter", "filters", metavar="KEY=VALUE", multiple=True, help=f"Only those that match: {_FILTERS}."
    )(function)
    return quiet_option(format_option(decorated))  # type: ignore[return-value]


def list_instances(form: str, filters: Sequence[str], *, quiet: bool, everything: bool) -> None:
    found = client().instances(filters)
    if not everything:
        found = [instance for instance in found if instance["status"]["phase"] in _ALIVE]
    if quiet:
        for instance in found:
            output.line(instance["id"])
    elif form == "table":
        output.table(_COLUMNS, map(_row, found))
    else:
        output.records(found, form)


def _row(instance: Mapping[str, Any]) -> tuple[str, ...]:
    spec = instance["spec"]
    return (
        instance["name"],
        instance["id"],
        spec["image"],
        status(instance),
        spec.get("isolation", ""),
        instance.get("address", ""),
        ", ".join(_port(port) for port in spec.get("ports", ())),
    )


def status(instance: Mapping[str, Any]) -> str:
    """Its phase, since when, and what is remarkable about it."""
    seen = instance["status"]
    phase = str(seen["phase"])
    if phase == "running":
        health = f" ({seen['health']})" if seen.get("health") else ""
        return f"running {output.age(seen.get('started_at'))}{health}"
    if phase == "exited":
        code = f" ({seen['exit_code']})" if "exit_code" in seen else ""
        ended = f" {output.age(seen['finished_at'])} ago" if "finished_at" in seen else ""
        return f"exited{code}{ended}"
    if phase == "backoff":
        return f"backoff ({seen.get('restarts', 0)} restarts)"
    return phase


def _port(port: Mapping[str, Any]) -> str:
    address = port.get("host_address", "0.0.0.0")  # noqa: S104  (shown, not bound)
    return f"{address}:{port['host_port']}->{port['instance_port']}/{port.get('protocol', 'tcp')}"
