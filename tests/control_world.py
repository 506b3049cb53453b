"""The whole of Alveole but the kernel, in virtual time: real control plane and agent over a memory store and fakes.

Its parts can be killed and begun again, as a daemon can: the store and the fake host stay as they were.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

import pytest

from alveole.agent import cellmaker, keeper, roots
from alveole.agent.engine import Engine
from alveole.agent.record import Paths
from alveole.agent.session import Agent
from alveole.agent.steps import FaultHook, no_fault
from alveole.agent.streams import LocalStreams
from alveole.api.service import Service
from alveole.control import instances, keys
from alveole.control.cache import Cache
from alveole.control.commit import Context
from alveole.control.nodes import LocalLink
from alveole.control.query import wait_operation
from alveole.control.reconcile import Reconciler
from alveole.host import mount
from alveole.host.cgroup import Cgroups, Layout
from alveole.host.identity import Identity
from alveole.model.instance import Instance, InstanceSpec, Isolation
from alveole.model.node import Node
from alveole.model.operation import Operation, OperationState
from alveole.runtime.fake import FakeHost, Program
from alveole.store.memory import MemoryStore
from tests.fakes import FakeImages, FakeNetwork, FakeTemplates, FakeVolumes, WatchedRuntime, mortal, running
from tests.virtual import SeededIds, VirtualClock

T = TypeVar("T")
PROGRAMS: Mapping[tuple[str, ...], Program] = {
    ("quick",): Program(code=0, after_s=0.0),
    ("ok",): Program(code=0, after_s=0.5, stdout=b"done\n"),
    ("fail",): Program(code=3, after_s=0.5),
    ("serve",): Program(after_s=None, stdout=b"ready\n", handles={15: 0}),
    ("deaf",): Program(after_s=None, handles={15: None}),
    ("echo",): Program(code=7, stdout=b"out\n", stderr=b"err\n"),
}
POOL = IPv4Network("10.64.0.0/16")


@dataclass
class Life:
    """One life of the agent. When it is dead, nothing it still tries has an effect."""

    engine: Engine
    agent: Agent
    task: "asyncio.Task[None]"
    alive: list[bool]

    def kill(self) -> None:
        """As SIGKILL: no cleaning up."""
        self.alive.clear()
        self.engine.paths.instances = self.engine.paths.instances.parent / "grave"
        self.engine.paths.run = self.engine.paths.instances / "run"
        self.task.cancel()


@dataclass
class World:
    root: Path
    seed: int = 0
    pause: Callable[[], float] = lambda: 0.0
    fault: FaultHook = no_fault
    isolations: tuple[str, ...] = tuple(Isolation)
    clock: VirtualClock = field(default_factory=VirtualClock)
    doubled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = MemoryStore(asyncio.get_running_loop().time)
        self.host = FakeHost(clock=lambda: self.clock.now().timestamp(), programs=PROGRAMS, unknown=None)
        self.images, self.network = FakeImages(), FakeNetwork()
        self.volumes = FakeVolumes(self.root)
        self.templates = FakeTemplates()
        self.ids = SeededIds(self.seed)
        self.life: Life | None = None
        self._control: asyncio.Task[None] | None = None

    # --- lives -------------------------------------------------------------------------------------------------------

    async def control_up(self) -> None:
        cache, ready = Cache(self.store), asyncio.Event()
        self.context = Context(self.store, cache, self.clock, self.ids, POOL)
        self._control = asyncio.create_task(self._run_control(cache, ready))
        await ready.wait()

    async def _run_control(self, cache: Cache, ready: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(cache.run(ready))
            await ready.wait()
            group.create_task(Reconciler(self.context).run())

    async def control_down(self) -> None:
        await _end(self._control)
        self._control = None

    async def agent_up(self) -> Life:
        engine, alive = self._engine()
        agent = Agent(engine)
        self.life = Life(engine, agent, asyncio.create_task(agent.run()), alive)
        await agent.synced.wait()
        return self.life

    def _engine(self) -> tuple[Engine, list[bool]]:
        alive = [True]

        def mine(target: Any) -> Any:
            return mortal(target, lambda: bool(alive), self.pause)

        state, run = self.root / "state", self.root / "run"
        runtime = mine(WatchedRuntime(self.host, self.doubled, self.templates))
        engine = Engine(
            link=mine(LocalLink(self.context)),
            node=Node(
                name="node-1",
                cpus=4,
                memory_bytes=8 << 30,
                isolations=self.isolations,
                boot_id="boot",
                registered_at=self.clock.now(),
            ),
            identity=Identity(id="0a1b2c3d", state=state, run=run, uid_base=1 << 28, pool=POOL),
            paths=Paths(state, run),
            clock=self.clock,
            runtimes=dict.fromkeys(Isolation, runtime),
            images=mine(self.images),
            network=mine(self.network),
            volumes=mine(self.volumes),
            cgroups=Cgroups(Layout()),
            fault=self.fault,
        )
        return engine, alive

    async def agent_down(self, *, kill: bool = True) -> None:
        if self.life is not None:
            if kill:
                self.life.kill()
            await _end(self.life.task)
            self.life = None

    async def close(self) -> None:
        await self.agent_down(kill=False)
        await self.control_down()
        await self.store.close()

    def service(self) -> Service:
        assert self.life is not None
        streams = LocalStreams(self.life.engine, self.life.agent)
        return Service(self.context, streams, "node-1", "0.0.0")

    # --- what tests do and look at -----------------------------------------------------------------------------------

    async def run(self, name: str = "web", command: Sequence[str] = ("serve",), **fields: Any) -> Operation:
        """``alveole run``: the operation when it is finished."""
        return await self.finished(await self.begin(name, command, **fields))

    async def begin(
        self, name: str | None = "web", command: Sequence[str] = ("serve",), *, start: bool = True, **fields: Any
    ) -> Operation:
        spec = InstanceSpec(**{"image": "app", "command": tuple(command), **fields})
        return await instances.create(self.context, "default", name, spec, start=start)

    async def finished(self, operation: Operation, timeout_s: float = 600.0) -> Operation:
        return await wait_operation(self.context.cache, operation.project, operation.id, timeout_s)

    def find(self, name: str = "web") -> Instance | None:
        entry = self.context.cache.get(keys.instance("default", name))
        return entry.record if entry else None

    def instance(self, name: str = "web") -> Instance:
        found = self.find(name)
        assert found is not None, f"{name} is not there"
        return found

    def operation(self, identifier: str) -> Operation:
        entry = self.context.cache.get(keys.operation("default", identifier))
        assert entry is not None
        found: Operation = entry.record
        return found

    def records(self, plural: str) -> list[Any]:
        return [entry.record for entry in self.context.cache.everywhere(plural)]

    @property
    def running(self) -> set[str]:
        """Names of instances whose process runs."""
        names = {instance.id: instance.name for instance in self.records("instances")}
        return {names.get(identifier, identifier) for identifier in running(self.host)}

    async def until(self, reached: Callable[[], bool], limit_s: float = 600.0) -> None:
        async with asyncio.timeout(limit_s):
            while not reached():  # noqa: ASYNC110  (costs nothing in virtual time)
                await asyncio.sleep(0.05)

    async def settle(self, limit_s: float = 900.0) -> None:
        """Until all operations are finished and the agent has seen all that was asked for."""
        await asyncio.sleep(0.1)
        await self.until(self._is_settled, limit_s)
        await asyncio.sleep(5.0)

    def _is_settled(self) -> bool:
        busy = any(operation.state is OperationState.RUNNING for operation in self.records("operations"))
        seen = all(i.status.observed_generation == i.generation for i in self.records("instances"))
        return seen and not busy

    def check(self) -> None:
        """Nothing is doubled, and everything on the host and in the store belongs to a record."""
        known = {instance.id: instance for instance in self.records("instances")}
        assert not self.doubled
        assert set(self.host.tasks) <= set(known)
        assert set(self.network.attachments) <= set(known)
        assert {path.name for path in (self.root / "state/instances").glob("*")} <= set(known)
        assert {path.name for path in (self.root / "run/i").glob("*")} <= set(known)
        assert len(self.network.ranges) <= len(known)
        assert {path.name for path in (self.root / "state/snapshots").glob("*")} <= {
            s.id for s in self.records("snapshots")
        }
        assert self.volumes.disks == {volume.id for volume in self.records("volumes")}
        cache = self.context.cache
        assert cache.names("addresses/") == {instance.address for instance in known.values() if instance.address}
        assert cache.names("subnets/") == {n.subnet.replace("/", "-") for n in self.records("networks")}


async def _end(task: "asyncio.Task[None] | None") -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()


@asynccontextmanager
async def living(root: Path, **fields: Any) -> AsyncIterator[World]:
    """A world with control plane and agent up, and nothing left of it at the end."""
    world = World(root, **fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mount, "mount_overlay", _fake_overlay)
        patch.setattr(mount, "bind_idmapped", _fake_bind)
        patch.setattr(mount, "unmount_below", _fake_unmount)
        patch.setattr(cellmaker, "run", _fake_rm)
        patch.setattr(roots, "run", _fake_rm)
        patch.setattr(keeper, "in_thread", _at_once)
        patch.setattr(roots, "copy_tree", _fake_copy)
        await world.control_up()
        await world.agent_up()
        try:
            yield world
        finally:
            await world.close()


async def _fake_overlay(target: Path, _lowers: Any, upper: Path, work: Path, **_shift: Any) -> None:
    for path in (target, upper, work):
        path.mkdir(parents=True, exist_ok=True)


async def _fake_bind(_source: Path, target: Path, _namespace: Path, **_how: Any) -> None:
    target.mkdir(parents=True, exist_ok=True)


async def _fake_unmount(_directory: Path) -> None:
    return


async def _at_once(call: Callable[[], T]) -> T:
    """Threads know no virtual time."""
    return call()


async def _fake_copy(source: Path, target: Path, **_shift: Any) -> None:
    shutil.copytree(source, target)


async def _fake_rm(argv: Sequence[str], **_limits: Any) -> None:
    shutil.rmtree(argv[-1])
