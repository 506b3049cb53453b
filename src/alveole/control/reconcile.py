"""The control loop: brings instances from what users wrote to a node, and clears away what has ended."""

import asyncio
import logging

from alveole.control import keys, networks, operations
from alveole.control.cache import Entry
from alveole.control.commit import Context, Plan, commit, put, unchanged
from alveole.control.reports import read_error
from alveole.control.schedules import Schedules
from alveole.control.settle import delete_instance, end_operation
from alveole.model.error import AlveoleError, ErrorCode, not_found, unsupported
from alveole.model.image import ImageContent
from alveole.model.instance import Desired, Instance, Placement
from alveole.model.operation import OperationState
from alveole.model.reference import normalise
from alveole.policy.lifecycle import is_settled
from alveole.policy.place import NoFit, place

log = logging.getLogger(__name__)
TICK_S = 1.0


class Reconciler:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._schedules = Schedules(context)
        self._waiting: set[str] = set()  # keys of instances that wait for an image, a volume or a node
        self._failed: set[str] = set()  # those that could not be written, on a full disk for example

    async def run(self) -> None:
        """Reconcile everything once, then what changes, until cancelled."""
        await networks.finish_removals(self._context)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="reconcile")
            group.create_task(self._tick(), name="reconcile-tick")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for key in tuple(self._failed):
                await self._one(key)
            try:
                await operations.enforce_deadlines(self._context)
                await operations.forget_old(self._context)
                await self._schedules.tick()
            except AlveoleError as error:
                log.warning("operations could not be tidied, trying again: %s", error)

    async def _follow(self) -> None:
        while True:
            with self._context.cache.subscribe() as subscription:
                for entry in list(self._context.cache.everywhere("instances")):
                    await self._one(entry.key)
                try:
                    async for update in subscription.updates():
                        await self._changed(update.key)
                except AlveoleError as error:
                    if error.code is not ErrorCode.GONE:
                        raise
                    log.warning("the reconciler fell behind; listing again")

    async def _changed(self, key: str) -> None:
        if keys.table_of(key).endswith("/instances/"):
            await self._one(key)
        elif not key.startswith(("addresses/", "subnets/", "idempotency/")):
            for waiting in tuple(self._waiting):
                await self._one(waiting)

    async def _one(self, key: str) -> None:
        self._waiting.discard(key)
        self._failed.discard(key)
        try:
            await commit(self._context, lambda: self._plan(key))
        except AlveoleError as error:
            log.warning("%s could not be brought further, trying again: %s", key, error)
            self._failed.add(key)
            return
        entry = self._context.cache.get(key)
        if entry is not None and entry.record.placement is None:
            self._waiting.add(key)

    def _plan(self, key: str) -> Plan[None]:
        entry = self._context.cache.get(key)
        if entry is None:
            return Plan(None)
        instance: Instance = entry.record
        if instance.placement is not None:
            return self._plan_placed(entry)
        if instance.desired is Desired.REMOVED:
            return self._plan_delete(entry, None)
        try:
            return self._plan_place(entry)
        except AlveoleError as error:
            return self._plan_delete(entry, error)

    def _plan_placed(self, entry: Entry) -> Plan[None]:
        instance: Instance = entry.record
        over = instance.spec.remove_on_exit and is_settled(instance, instance.status)
        if not over or instance.desired is Desired.REMOVED:
            return Plan(None)
        changed = instance.replace(desired=Desired.REMOVED, generation=instance.generation + 1)
        return Plan(None, (unchanged(entry),), (put(entry.key, changed),))

    def _plan_delete(self, entry: Entry, error: AlveoleError | None) -> Plan[None]:
        """Nothing of it is on any node: only its record goes."""
        compare, writes = delete_instance(self._context, entry)
        more_compare, more_writes = end_operation(self._context, entry.record, error)
        return Plan(None, (*compare, *more_compare), (*writes, *more_writes))

    def _plan_place(self, entry: Entry) -> Plan[None]:
        """Place it if all it needs is there. Raises what its operation then fails with."""
        instance: Instance = entry.record
        image = self._image(instance)
        nodes = [node.record for node in self._context.cache.table(keys.NODES)]
        if image is None or not self._volumes_ready(instance) or not nodes:
            return Plan(None)
        chosen = instance.origin.node if instance.origin is not None else place(instance.spec, nodes)
        if isinstance(chosen, NoFit):
            raise unsupported(f"no node can run instance {instance.name}: {chosen}", hint="alveole doctor explains")
        placed = instance.replace(image=image, image_operation="", placement=Placement(node=chosen, epoch=1))
        return Plan(None, (unchanged(entry),), (put(entry.key, placed),))

    def _image(self, instance: Instance) -> ImageContent | None:
        """Its content; None while it is being fetched. Raises what the fetch failed with."""
        if instance.image is not None:
            return instance.image
        cache = self._context.cache
        operation = cache.get(keys.operation(instance.project, instance.image_operation))
        if operation is not None and operation.record.state is OperationState.RUNNING:
            return None
        if operation is not None and operation.record.error:
            raise read_error(operation.record.error)
        image = cache.get(keys.image(instance.project, normalise(instance.spec.image)))
        if image is None or image.record.content is None:
            raise AlveoleError(ErrorCode.NOT_FOUND, f"image {instance.spec.image} was removed")
        content: ImageContent = image.record.content
        return content

    def _volumes_ready(self, instance: Instance) -> bool:
        ready = True
        for mount in instance.spec.mounts:
            if mount.kind != "volume":
                continue
            volume = self._context.cache.get(keys.volume(instance.project, mount.source))
            if volume is None:
                raise self._why_no_volume(instance.project, mount.source)
            ready = ready and volume.record.phase == "ready"
        return ready

    def _why_no_volume(self, project: str, name: str) -> AlveoleError:
        """What its latest creation failed with."""
        made = [
            entry.record.error
            for entry in self._context.cache.table(keys.collection(project, "operations"))
            if entry.record.verb == "volume.create" and entry.record.target == f"volume/{name}" and entry.record.error
        ]
        return read_error(made[-1]) if made else not_found(f"volume {name} was removed")
