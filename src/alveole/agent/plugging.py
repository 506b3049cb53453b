"""Volumes that come to a running machine and leave it, as its assignment says."""

from collections.abc import AsyncIterator

from alveole.agent.engine import Engine
from alveole.agent.mounts import hold_volumes, release_volumes
from alveole.agent.record import LocalRecord
from alveole.model.agent import InstanceAssignment
from alveole.runtime.base import Capability, CellMount, Handle, Plugging


def differs(engine: Engine, assignment: InstanceAssignment, record: LocalRecord) -> bool:
    """Whether a running instance has other volumes than it shall have, and can be given them."""
    runtime = engine.runtimes[assignment.instance.spec.isolation]
    wanted = {volume.id for volume in assignment.volumes}
    return Capability.MACHINE in runtime.capabilities and wanted != set(record.volumes)


async def replug(
    engine: Engine, runtime: Plugging, assignment: InstanceAssignment, record: LocalRecord, handle: Handle
) -> AsyncIterator[LocalRecord]:
    """Yields the record after each effect that must be remembered."""
    wanted = {volume.id: volume for volume in assignment.volumes}
    for identifier in record.volumes:
        if identifier not in wanted:
            await runtime.unplug(handle, identifier)
            await release_volumes(engine, record.instance_id, (identifier,))
            record = record.replace(volumes=tuple(held for held in record.volumes if held != identifier))
            yield record
    for mount in assignment.instance.spec.mounts:
        volume = next((v for v in wanted.values() if mount.kind == "volume" and v.name == mount.source), None)
        if volume is None or volume.id in record.volumes:
            continue
        hold_volumes(engine, assignment)
        try:
            disk = await engine.volumes.ensure_disk(volume)
            part = CellMount(target=mount.target, source=disk, disk=True, read_only=mount.read_only)
            await runtime.plug(handle, volume.id, part)
        except BaseException:
            await release_volumes(engine, record.instance_id, (volume.id,))
            raise
        record = record.replace(volumes=(*record.volumes, volume.id))
        yield record
