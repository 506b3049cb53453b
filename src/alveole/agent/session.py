"""The agent of one node: receives assignments, keeps a keeper for each instance and a task for each operation."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from alveole.agent import snapshots
from alveole.agent.engine import Engine
from alveole.agent.keeper import Keeper
from alveole.agent.logs import rotate_large_logs
from alveole.agent.record import ids_on_disk, load_all
from alveole.agent.tasks import Task
from alveole.model.agent import InstanceAssignment, Synced, TaskAssignment, Withdrawal
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.operation import OperationState
from alveole.runtime.base import Ids

log = logging.getLogger(__name__)
UPKEEP_S = 5.0
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 60.0


class Agent:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._keepers: dict[str, Keeper] = {}
        self._tasks: dict[str, Task] = {}
        self.synced = asyncio.Event()  # everything assigned at the start has a keeper

    @property
    def keepers(self) -> dict[str, Keeper]:
        return self._keepers

    def holds_instances(self) -> bool:
        """Whether anything is made on this node now that must go on without the daemon.

        A daemon that ends before it knows, knows only what is on disk: that may all be running.
        """
        if not self.synced.is_set():
            return bool(load_all(self._engine.paths))
        return any(keeper.local.attachment is not None for keeper in self._keepers.values())

    async def run(self) -> None:
        """Until cancelled. Instances go on when it ends."""
        await self._recover_network()
        await self._engine.captures.sweep(self._engine.paths, self._engine.volumes)
        await self._engine.link.register(self._engine.node)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._upkeep(), name="upkeep")
            while True:
                try:
                    await self._follow(group)
                except AlveoleError as error:
                    if error.code is not ErrorCode.GONE:
                        raise
                    log.warning("the agent fell behind its assignments; asking for all of them again")

    async def _follow(self, group: asyncio.TaskGroup) -> None:
        waiting: list[InstanceAssignment] | None = []
        async for assignment in self._engine.link.assignments(self._engine.node.name):
            match assignment:
                case InstanceAssignment() if waiting is not None:
                    waiting.append(assignment)
                case InstanceAssignment():
                    self._assign(group, assignment)
                case Withdrawal(instance_id=identifier):
                    if identifier in self._keepers:
                        self._keepers[identifier].assign(None)
                case TaskAssignment(operation=operation):
                    self._task(group, operation)
                case Synced():
                    await self._begin(group, waiting or [], assignment)
                    waiting = None

    async def _begin(self, group: asyncio.TaskGroup, assigned: list[InstanceAssignment], synced: Synced) -> None:
        """All that is assigned is known: keep it, and remove what is here beyond it."""
        kept = {assignment.instance.id for assignment in assigned}
        if synced.complete and not self.synced.is_set():  # later on, a disk may be one that a task is making
            disks = {name for snapshot in synced.snapshots for name in snapshots.disk_names(snapshot)}
            await self._engine.volumes.recover(synced.volumes, kept | disks)
            await snapshots.sweep(self._engine, synced.snapshots)
        for identifier in self._keepers.keys() - kept if synced.complete else ():
            self._keepers[identifier].assign(None)
        for assignment in assigned:
            self._assign(group, assignment)
        for identifier in load_all(self._engine.paths):
            if identifier not in self._keepers and synced.complete:
                log.warning("removing %s, left over from an instance that is no longer recorded", identifier)
                self._keep(group, Keeper(self._engine, identifier, None))
        self.synced.set()

    async def _recover_network(self) -> None:
        records = load_all(self._engine.paths)
        known = [record for record in records.values() if record is not None]
        bases = {record.ids_base for record in known}
        bases |= {ids_on_disk(self._engine.paths, identifier) for identifier in records}
        await self._engine.network.recover(
            [record.attachment for record in known if record.attachment is not None],
            [Ids(base=base) for base in sorted(bases - {0})],
        )

    def _assign(self, group: asyncio.TaskGroup, assignment: InstanceAssignment) -> None:
        identifier = assignment.instance.id
        keeper = self._keepers.get(identifier)
        if keeper is not None:
            keeper.assign(assignment)
        else:
            self._keep(group, Keeper(self._engine, identifier, assignment))

    def _keep(self, group: asyncio.TaskGroup, keeper: Keeper) -> None:
        self._keepers[keeper.id] = keeper
        group.create_task(self._guard(keeper.id, keeper.run), name=f"keep-{keeper.id}")

    async def _guard(self, identifier: str, run: Any) -> None:
        """A fault in one keeper is logged and tried again; it never touches another instance."""
        delay_s = RETRY_FIRST_S
        while True:
            try:
                await run()
            except Exception:
                log.exception("keeping instance %s failed; trying again in %g s", identifier, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_MAX_S)
            else:
                del self._keepers[identifier]
                return

    def _task(self, group: asyncio.TaskGroup, operation: Any) -> None:
        running = self._tasks.get(operation.id)
        if operation.state is not OperationState.RUNNING:
            if running is not None:
                running.end(operation)
            return
        if running is None:
            task = self._tasks[operation.id] = Task(self._engine, operation)
            group.create_task(self._finish(operation.id, task.run()), name=operation.verb)

    async def _finish(self, identifier: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        finally:
            del self._tasks[identifier]

    async def _upkeep(self) -> None:
        while True:
            await asyncio.sleep(UPKEEP_S)
            try:
                await rotate_large_logs(self._engine, tuple(self._keepers.values()))
                await self._engine.network.repair()
                moments = {keeper.moment for keeper in self._keepers.values()}
                await self._engine.captures.sweep(self._engine.paths, self._engine.volumes, wanted=moments)
            except (AlveoleError, OSError) as error:
                log.warning("upkeep of this node: %s", error)
