"""`alveole stats`."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client
from alveole.cli.options import complete_instances, format_option
from alveole.client.errors import ApiError

_COLUMNS = ("NAME", "CPU %", "MEMORY", "LIMIT", "OWN", "SHARED", "PIDS", "RECEIVED", "SENT", "READ", "WRITTEN")
_BYTES = ("memory_bytes", "memory_limit_bytes", "own_bytes", "shared_bytes")
_FLOWS = ("received_bytes", "sent_bytes", "read_bytes", "written_bytes")
_REFRESH_S = 1.0
_FIRST_S = 0.5  # between the two looks that the first figure for the processor needs
_HOME_AND_CLEAR = "\x1b[H\x1b[J"

Sample = tuple[float, dict[str, Any]]  # when it was taken, and what it said


@click.command()
@click.option("--no-stream", is_flag=True, help="Print once and end.")
@format_option
@click.argument("instances", metavar="[INSTANCE]...", nargs=-1, shell_complete=complete_instances)
def command(instances: tuple[str, ...], no_stream: bool, form: str) -> None:
    """Show what running instances use: all of them if none is named.

    MEMORY is what the limit counts. OWN is what its processes have for themselves, and is given back when it is
    removed; SHARED is its part of what others have too: the pages of a template, of programs and libraries.

    \b
    Examples:
      alveole stats
      alveole stats --no-stream --format json web
    """
    before = _samples(instances)
    time.sleep(_FIRST_S)
    while True:
        now = _samples(instances)
        if not no_stream and sys.stdout.isatty() and form == "table":
            sys.stdout.write(_HOME_AND_CLEAR)
        _show(before, now, form)
        sys.stdout.flush()
        if no_stream:
            return
        before = now
        time.sleep(_REFRESH_S)


def _samples(names: Sequence[str]) -> dict[str, Sample]:
    """Those named must be there; of all that run, some may have ended meanwhile."""
    api = client()
    if names:
        return {name: (time.monotonic(), api.stats(name)) for name in names}
    found: dict[str, Sample] = {}
    for instance in api.instances(["phase=running"]):
        try:
            found[instance["id"]] = (time.monotonic(), api.stats(instance["id"]))
        except ApiError as error:
            if error.code not in {"not_found", "conflict"}:
                raise
    return found


def _show(before: dict[str, Sample], now: dict[str, Sample], form: str) -> None:
    if form == "table":
        output.table(_COLUMNS, [_row(before.get(key), sample) for key, sample in now.items()])
    else:
        output.records([used for _, used in now.values()], form)


def _row(before: Sample | None, now: Sample) -> tuple[str, ...]:
    used = now[1]
    return (
        used["name"],
        cpu_percent(before, now),
        *(output.size(used.get(name)) for name in _BYTES),
        str(used.get("pids", "")),
        *(output.size(used.get(name)) for name in _FLOWS),
    )


def cpu_percent(before: Sample | None, now: Sample) -> str:
    """Of one processor, between two samples; empty where that is not known."""
    if before is None or "cpu_s" not in before[1] or "cpu_s" not in now[1] or now[0] <= before[0]:
        return ""
    return f"{max(0.0, now[1]['cpu_s'] - before[1]['cpu_s']) / (now[0] - before[0]) * 100:.1f}"
