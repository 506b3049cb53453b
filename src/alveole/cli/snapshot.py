"""`alveole snapshot`."""

from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import (
    complete_instances,
    format_option,
    inspect_each,
    instance_argument,
    quiet_option,
    record_format_option,
)
from alveole.cli.progress import finish
from alveole.cli.values import duration_s

_SNAPSHOTS = click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True)


@click.group()
def command() -> None:
    """Keep what instances are, go back to it, and begin others from it."""


@command.command()
@click.option("--name", metavar="NAME", help="Of the snapshot; made of the instance's and the time if not given.")
@click.option("--memory", is_flag=True, help="Keep memory and processes too: of a running vm or sandbox.")
@instance_argument
def create(instance: str, name: str | None, memory: bool) -> None:
    """Keep what an instance is now: what it wrote to its files, and its volumes, all of one moment.

    It stands still meanwhile: milliseconds, as disks share their blocks; the files of containers and sandboxes are
    copied where the disk of the state directory cannot share them. Host directories are no part of it.

    \b
    Examples:
      alveole snapshot create db
      alveole snapshot create --name before-upgrade --memory vm1
    """

    def submit(wait_s: float) -> dict[str, Any]:
        return client().create_snapshot(instance, name=name, memory=memory, wait_s=wait_s)

    output.line(finish(client(), submit)["result"]["name"])


@command.command()
@click.option("--every", metavar="TIME", help="How often, such as 10m or 1d.")
@click.option("--keep", metavar="NUMBER", type=click.IntRange(1, 1000), help="How many; older ones are removed.")
@click.option("--memory", is_flag=True, help="Keep memory and processes too.")
@click.option("--off", is_flag=True, help="Take no more. Those that were taken stay.")
@instance_argument
def schedule(instance: str, every: str | None, keep: int | None, memory: bool, off: bool) -> None:
    """Take snapshots of an instance by themselves, while it runs.

    \b
    Examples:
      alveole snapshot schedule --every 10m --keep 6 db
      alveole snapshot schedule --off db
    """
    if off in {every is not None, keep is not None}:
        raise click.UsageError("give --every and --keep, or --off")
    wanted = None if every is None else {"every_s": duration_s("--every", every), "keep": keep, "memory": memory}
    output.line(client().schedule_snapshots(instance, wanted)["name"])


@command.command("ls")
@quiet_option
@format_option
@click.argument("instance", required=False, shell_complete=complete_instances)
def list_snapshots(instance: str | None, quiet: bool, form: str) -> None:
    """List snapshots, oldest first: all, or those of one instance.

    \b
    Example:
      alveole snapshot ls db
    """
    found = [s for s in client().snapshots() if instance in {None, s["instance"], s["instance_id"]}]
    found.sort(key=lambda s: str(s["created_at"]))
    if quiet:
        for snapshot in found:
            output.line(snapshot["name"])
    elif form == "table":
        rows = (
            (
                s["name"],
                s["instance"],
                "yes" if s.get("memory") else "no",
                ", ".join(volume["name"] for volume in s.get("volumes", ())) or "-",
                s.get("phase", "ready"),
                output.age(s["created_at"]),
            )
            for s in found
        )
        output.table(("NAME", "INSTANCE", "MEMORY", "VOLUMES", "STATE", "AGE"), rows)
    else:
        output.records(found, form)


@command.command("rm")
@_SNAPSHOTS
def remove(snapshots: tuple[str, ...]) -> None:
    """Remove snapshots. What began from them stays.

    \b
    Example:
      alveole snapshot rm before-upgrade
    """

    def drop(name: str) -> None:
        finish(client(), lambda wait_s: client().remove_snapshot(name, wait_s=wait_s))
        output.line(name)

    each(snapshots, drop)


@command.command()
@click.argument("snapshot")
def restore(snapshot: str) -> None:
    """Let the instance be what it was then. What it is now is lost; it runs afterwards.

    Its files and volumes go back; with memory it goes on where it was, without it starts. Keep what it is now by
    another snapshot first.

    \b
    Example:
      alveole snapshot restore before-upgrade
    """
    finished = finish(client(), lambda wait_s: client().restore_snapshot(snapshot, wait_s=wait_s))
    output.line(finished["result"]["name"])


@command.command()
@click.option("--name", metavar="NAME", help="Of the new instance; made of the original's if not given.")
@click.option("--network", metavar="NETWORK", help="The network it is on, or none; the original's if not given.")
@click.argument("snapshot")
def fork(snapshot: str, name: str | None, network: str | None) -> None:
    """Make a new instance that begins as what was kept: a look into the past beside the present.

    It has an address of its own and no published ports; of each volume in the snapshot it gets a new one, NAME-VOLUME.

    \b
    Examples:
      alveole snapshot fork --name db-yesterday nightly
      alveole snapshot fork --network none web-evidence-20270102-030405
    """

    def submit(wait_s: float) -> dict[str, Any]:
        return client().fork_snapshot(snapshot, name=name, network=network, wait_s=wait_s)

    output.line(finish(client(), submit)["result"]["name"])


@command.command()
@format_option
@click.argument("snapshot")
@click.argument("other", required=False)
def diff(snapshot: str, other: str | None, form: str) -> None:
    """Show what changed from a snapshot to another one, or to what the instance is now.

    A added, C changed, D deleted. Volumes are no part of it, and no vm, whose disk the host does not look into.

    \b
    Examples:
      alveole snapshot diff before-upgrade
      alveole snapshot diff monday tuesday
    """
    from alveole.cli.diff import between, show

    api = client()
    later = api.snapshot_changes(other) if other else api.changes(api.snapshot(snapshot)["instance"])
    show(between(api.snapshot_changes(snapshot), later), form)


@command.command()
@record_format_option
@_SNAPSHOTS
def inspect(snapshots: tuple[str, ...], form: str) -> None:
    """Show all that is known of snapshots, as a list.

    \b
    Example:
      alveole snapshot inspect before-upgrade
    """
    inspect_each(snapshots, client().snapshot, form)
