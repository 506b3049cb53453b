"""Snapshots that are taken by themselves, as an instance's schedule says, and their removal."""

import logging
from datetime import datetime

from alveole.control import keys, snapshots
from alveole.control.commit import Context, Plan, commit, put, unchanged
from alveole.control.query import resolve_instance
from alveole.model.error import AlveoleError
from alveole.model.instance import Instance, Phase, Schedule
from alveole.model.snapshot import Snapshot
from alveole.policy.schedule import is_due, surplus

log = logging.getLogger(__name__)


async def set_schedule(context: Context, project: str, ref: str, schedule: Schedule | None) -> Instance:
    """From now on, or with None no more. Snapshots it has taken stay. Raises CONFLICT if memory cannot be kept."""

    def plan() -> Plan[Instance]:
        entry = resolve_instance(context.cache, project, ref)
        if schedule is not None and schedule.memory:
            snapshots.require_memory(context, entry.record)
        changed: Instance = entry.record.replace(schedule=schedule)
        return Plan(changed, (unchanged(entry),), (put(entry.key, changed),))

    return await commit(context, plan)


class Schedules:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._tried: dict[str, datetime] = {}  # by instance id

    async def tick(self) -> None:
        """Take what is due, remove what is too many. To be called every second or so."""
        for entry in list(self._context.cache.everywhere("instances")):
            if entry.record.schedule is not None:
                await self._one(entry.record, entry.record.schedule)

    async def _one(self, instance: Instance, schedule: Schedule) -> None:
        taken = [s for s in self._snapshots(instance.project) if s.scheduled and s.instance_id == instance.id]
        now = self._context.clock.now()
        try:
            if instance.status.phase is Phase.RUNNING and is_due(schedule, taken, self._tried.get(instance.id), now):
                self._tried[instance.id] = now
                await snapshots.create(
                    self._context, instance.project, instance.id, name=None, memory=schedule.memory, scheduled=True
                )
            for snapshot in surplus(schedule, taken):
                await snapshots.remove(self._context, instance.project, snapshot.name)
        except AlveoleError as error:
            log.warning("the schedule of instance %s: %s", instance.name, error)

    def _snapshots(self, project: str) -> list[Snapshot]:
        return [entry.record for entry in self._context.cache.table(keys.collection(project, "snapshots"))]
