"""The control end of the agent protocol."""

from collections.abc import AsyncIterator

from alveole.control import keys
from alveole.control.cache import Entry, Subscription
from alveole.control.commit import Context, Plan, absent, commit, put, unchanged
from alveole.control.reports import plan_instance_report, plan_task_report
from alveole.model.agent import (
    Assignment,
    InstanceAssignment,
    InstanceReport,
    Synced,
    TaskAssignment,
    TaskReport,
    Withdrawal,
)
from alveole.model.image import ImageContent
from alveole.model.instance import Instance
from alveole.model.node import Node
from alveole.model.operation import OperationState


class LocalLink:
    """``model.agent.AgentLink`` for the agent in the same process."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def register(self, node: Node) -> None:
        def plan() -> Plan[None]:
            key = keys.node(node.name)
            entry = self._context.cache.get(key)
            return Plan(None, (unchanged(entry) if entry else absent(key),), (put(key, node),))

        await commit(self._context, plan)

    async def assignments(self, node: str) -> AsyncIterator[Assignment]:
        with self._context.cache.subscribe("projects/") as subscription:
            sent: dict[str, tuple[int, int]] = {}
            for entry in self._context.cache.everywhere("instances"):
                for assignment in self._instance(entry, node, sent):
                    yield assignment
            yield Synced(
                volumes=tuple(entry.record for entry in self._context.cache.everywhere("volumes")),
                snapshots=tuple(entry.record for entry in self._context.cache.everywhere("snapshots")),
                complete=not self._context.cache.unreadable,
            )
            for entry in self._context.cache.everywhere("operations"):
                if entry.record.node == node and entry.record.state is OperationState.RUNNING:
                    yield TaskAssignment(operation=entry.record)
            async for assignment in self._changes(subscription, node, sent):
                yield assignment

    async def _changes(
        self, subscription: Subscription, node: str, sent: dict[str, tuple[int, int]]
    ) -> AsyncIterator[Assignment]:
        async for update in subscription.updates():
            table = keys.table_of(update.key).split("/")[2]
            if table == "operations" and update.new is not None and update.new.record.node == node:
                if update.old is None or update.old.record.state is not update.new.record.state:
                    yield TaskAssignment(operation=update.new.record)
            elif table == "instances" and update.new is not None:
                for assignment in self._instance(update.new, node, sent):
                    yield assignment
            elif table == "instances" and update.old is not None and update.old.record.id in sent:
                del sent[update.old.record.id]
                yield Withdrawal(instance_id=update.old.record.id)

    def _instance(self, entry: Entry, node: str, sent: dict[str, tuple[int, int]]) -> list[Assignment]:
        """What to send of this instance: nothing if the agent knows this generation, since it reports the rest."""
        instance: Instance = entry.record
        if instance.placement is None or instance.placement.node != node:
            return [Withdrawal(instance_id=instance.id)] if sent.pop(instance.id, None) is not None else []
        version = (instance.generation, instance.placement.epoch)
        if sent.get(instance.id) == version:
            return []
        sent[instance.id] = version
        cache = self._context.cache
        network = cache.get(keys.network(instance.project, instance.spec.network))
        volumes = (
            cache.get(keys.volume(instance.project, mount.source))
            for mount in instance.spec.mounts
            if mount.kind == "volume"
        )
        return [
            InstanceAssignment(
                instance=instance,
                network=network.record if network else None,
                volumes=tuple(volume.record for volume in volumes if volume is not None),
            )
        ]

    async def used_images(self) -> tuple[ImageContent, ...]:
        cache = self._context.cache
        contents = [entry.record.content for entry in cache.everywhere("images")]
        contents += [entry.record.image for kind in ("instances", "snapshots") for entry in cache.everywhere(kind)]
        return tuple({content.digest: content for content in contents if content is not None}.values())

    async def report_instance(self, report: InstanceReport) -> None:
        await commit(self._context, lambda: plan_instance_report(self._context, report))

    async def report_task(self, report: TaskReport) -> None:
        await commit(self._context, lambda: plan_task_report(self._context, report))
