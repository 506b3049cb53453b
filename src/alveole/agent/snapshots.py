"""Snapshots kept on this node: made of an instance while it stands still, and instances that begin from them.

A snapshot is a directory with its record, what the runtime captured if memory is kept too, and for walls that have
their root in a directory a copy of what the instance wrote to it; and disks of the volume driver, one for a root disk
and one for each volume. It is complete or not there.
"""

from functools import partial
from pathlib import Path
from typing import cast

from alveole.agent.captures import MEMORY, link_all
from alveole.agent.engine import Engine
from alveole.agent.record import LocalRecord
from alveole.agent.roots import give_root, keep_root, remove_tree
from alveole.agent.steps import StepLog
from alveole.host import mount
from alveole.host.blocking import in_thread
from alveole.model.agent import InstanceAssignment
from alveole.model.error import conflict, not_found
from alveole.model.instance import Origin
from alveole.model.snapshot import Snapshot
from alveole.model.volume import Volume
from alveole.runtime.base import Capability, Capturing, Handle, Plugging

_RECORD = "snapshot.json"


def disk_name(snapshot_id: str, volume_id: str = "") -> str:
    """Of its root disk, or of one of its volumes, among the root disks of the volume driver."""
    return f"snapshot-{snapshot_id}-{volume_id}" if volume_id else f"snapshot-{snapshot_id}"


def disk_names(snapshot: Snapshot) -> tuple[str, ...]:
    return (disk_name(snapshot.id), *(disk_name(snapshot.id, volume.id) for volume in snapshot.volumes))


async def make(engine: Engine, snapshot: Snapshot, steps: StepLog) -> None:
    """Raises CONFLICT if its memory is wanted and it does not run, or there is nothing of it here."""
    final = engine.paths.snapshot(snapshot.id)
    async with engine.files[snapshot.instance_id]:
        if final.exists():
            return
        await remove(engine, snapshot)
        new = final.with_suffix(".new")
        (new / MEMORY).mkdir(parents=True, mode=0o700)
        try:
            await _take(engine, snapshot, new, steps)
            with steps.step("keep"):
                (new / _RECORD).write_bytes(snapshot.to_json())
                new.rename(final)
        except BaseException:
            await remove(engine, snapshot)
            raise


async def _take(engine: Engine, snapshot: Snapshot, new: Path, steps: StepLog) -> None:
    runtime = engine.runtimes[snapshot.spec.isolation]
    handle: Handle | None = engine.captures.running.get(snapshot.instance_id)
    if snapshot.memory:
        if handle is None:
            raise conflict(f"instance {snapshot.instance} does not run any more", hint="start it first")
        with steps.step("capture"):
            copies = partial(_copy_disks, engine, snapshot, new)
            await cast("Capturing", runtime).capture(handle, new / MEMORY, copies, go_on=True)
        return
    try:
        if handle is not None:
            with steps.step("pause"):
                if Capability.MACHINE in runtime.capabilities:
                    await cast("Plugging", runtime).flush(handle)
                await runtime.pause(handle)
        with steps.step("copy"):
            await _copy_disks(engine, snapshot, new)
    finally:
        if handle is not None:
            await runtime.resume(handle)


async def _copy_disks(engine: Engine, snapshot: Snapshot, new: Path) -> None:
    """Volumes and what it wrote to its root: nobody but others who share its volumes writes meanwhile."""
    for volume in snapshot.volumes:
        await engine.volumes.keep_volume(volume.id, disk_name(snapshot.id, volume.id))
    runtime = engine.runtimes[snapshot.spec.isolation]
    disk = disk_name(snapshot.id)
    await keep_root(engine.paths, engine.volumes, runtime, snapshot.instance_id, disk=disk, moment=new)


async def remove(engine: Engine, snapshot: Snapshot) -> None:
    """Complete, half made, or not there."""
    final = engine.paths.snapshot(snapshot.id)
    if final.exists():
        doomed = final.with_suffix(".new")
        await remove_tree(doomed)
        final.rename(doomed)
    await remove_tree(final.with_suffix(".new"))
    for name in disk_names(snapshot):
        await engine.volumes.remove_root_disk(name)


async def sweep(engine: Engine, known: tuple[Snapshot, ...]) -> None:
    """Remove the directories of no snapshot of these. To be called while none is being made."""
    if not engine.paths.snapshots.exists():
        return
    names = {snapshot.id for snapshot in known}
    for entry in tuple(engine.paths.snapshots.iterdir()):
        if entry.name not in names:
            await remove_tree(entry)


async def begin_anew(engine: Engine, assignment: InstanceAssignment, record: LocalRecord) -> None:
    """Leave nothing of the instance's files; give it those of its origin, if that is a snapshot.

    What it had is lost only once all that it shall have is there.
    """
    paths, instance = engine.paths, assignment.instance
    origin = instance.origin if instance.origin is not None and instance.origin.snapshot else None
    await mount.unmount_below(paths.volatile(instance.id))
    await remove_tree(paths.origin(instance.id))
    if origin is not None:
        await _give(engine, assignment, record, origin)
    else:
        await engine.volumes.remove_root_disk(instance.id)
        await remove_tree(paths.upper(instance.id))
    await remove_tree(paths.work(instance.id))
    await remove_tree(paths.asleep(instance.id))


async def _give(engine: Engine, assignment: InstanceAssignment, record: LocalRecord, origin: Origin) -> None:
    kept, instance = engine.paths.snapshot(origin.moment), assignment.instance
    if not kept.exists():
        raise not_found(f"snapshot {origin.snapshot} is not on node {engine.node.name}")
    snapshot = Snapshot.from_json((kept / _RECORD).read_bytes())
    back = snapshot.volumes if snapshot.instance_id == instance.id else ()
    held = {volume.id for volume in assignment.volumes}
    volumes = [volume for volume in back if volume.id in held]
    for volume in volumes:
        _refuse_shared(engine, volume, instance.id)
    await give_root(
        engine.paths,
        engine.volumes,
        engine.runtimes[snapshot.spec.isolation],
        instance.id,
        disk=disk_name(snapshot.id),
        moment=kept,
        ids_base=record.ids_base,
    )
    for volume in volumes:
        await engine.volumes.restore_volume(disk_name(snapshot.id, volume.id), volume)
    if origin.memory:
        await in_thread(partial(link_all, kept / MEMORY, engine.paths.origin(instance.id)))


def _refuse_shared(engine: Engine, volume: Volume, instance_id: str) -> None:
    if others := engine.volume_holders.others(volume.id, instance_id):
        raise conflict(
            f"volume {volume.name} is used by instance {others[0]} too: it cannot be put back under its hands",
            hint=f"alveole stop {others[0]}",
        )


async def fill_volume(engine: Engine, volume: Volume, snapshot_id: str, volume_id: str) -> None:
    """A new volume with what another held when the snapshot was taken."""
    await engine.volumes.restore_volume(disk_name(snapshot_id, volume_id), volume)
