"""A volume is held by the node, for many containers and sandboxes, or by one machine: whoever comes second is told."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from alveole.agent.engine import Engine
from alveole.control import instances
from alveole.model.instance import Isolation
from alveole.model.operation import Operation, OperationState
from alveole.runtime.base import Capability, Cell, CellMount, Handle
from alveole.runtime.fake import FakeRuntime
from tests.control_world import World, living
from tests.fakes import WALL, mortal
from tests.unit.test_control_crash import Killer
from tests.virtual import virtual

DATA: list[dict[str, Any]] = [{"kind": "volume", "source": "data", "target": "/data"}]
MACHINE: dict[str, Any] = {"isolation": "vm", "mounts": DATA}
CONTAINER: dict[str, Any] = {"isolation": "container", "mounts": DATA}
SANDBOX: dict[str, Any] = {"isolation": "sandbox", "mounts": DATA}
MACHINE_WALL = (WALL | {Capability.MACHINE}) - {Capability.USER_NAMESPACE, Capability.HOST_NETWORK}


class MachineRuntime(FakeRuntime):
    """Notes what the machines were given."""

    mounts: dict[str, tuple[CellMount, ...]]

    async def create(self, cell: Cell) -> Handle:
        self.mounts[cell.id] = cell.mounts
        return await super().create(cell)

    def describe(self, handle: Handle) -> dict[str, Any]:
        return {"kernel": f"of {handle.id}"}


@asynccontextmanager
async def with_machines(root: Path, **fields: Any) -> AsyncIterator[tuple[World, dict[str, tuple[CellMount, ...]]]]:
    """A world whose vms are machines, and what they were given, by their ids."""
    given: dict[str, tuple[CellMount, ...]] = {}
    plain = World._engine

    def engine(world: World) -> tuple[Engine, list[bool]]:
        made, alive = plain(world)
        runtime = MachineRuntime(world.host, capabilities=MACHINE_WALL)
        runtime.mounts = given
        machines = mortal(runtime, lambda: bool(alive), world.pause)
        return dataclasses.replace(made, runtimes={**made.runtimes, Isolation.VM: machines}), alive

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "_engine", engine)
        async with living(root, **fields) as world:
            yield world, given


def refused(operation: Operation, by: str) -> None:
    assert operation.state is OperationState.FAILED, operation
    assert operation.error is not None
    assert operation.error["code"] == "conflict"
    assert f"volume data is held by instance {by}" in str(operation.error["message"])
    assert by in str(operation.error["hint"])


def done(operation: Operation) -> None:
    assert operation.state is OperationState.DONE, operation


async def stop(world: World, name: str) -> None:
    done(await world.finished(await instances.stop(world.context, "default", name, None)))


@virtual
async def test_a_machine_gets_the_raw_disk_and_is_refused_what_containers_hold(tmp_path: Path) -> None:
    async with with_machines(tmp_path) as (world, given):
        done(await world.run("web", **CONTAINER))
        done(await world.run("copy", **SANDBOX))  # the node's mount is bound into as many as wish
        refused(await world.run("db", **MACHINE), by="web")
        assert len(world.volumes.mounted) == 1
        await stop(world, "web")
        refused(await world.run("db", **MACHINE), by="copy")
        await stop(world, "copy")
        assert world.volumes.mounted == set()
        done(await world.run("db", **MACHINE))
        disk = next(mount for mount in given[world.instance("db").id] if mount.target == "/data")
        assert disk.disk
        assert disk.source is not None
        assert disk.source.name == f"{world.records('volumes')[0].id}.img"
        assert world.volumes.mounted == set()


@virtual
async def test_what_a_machine_holds_is_refused_to_all_others(tmp_path: Path) -> None:
    async with with_machines(tmp_path) as (world, _):
        done(await world.run("db", **MACHINE))
        for name, other in (("web", CONTAINER), ("box", SANDBOX), ("db2", MACHINE)):
            refused(await world.run(name, **other), by="db")
        assert world.volumes.mounted == set()
        assert world.running == {"db"}
        await stop(world, "db")
        done(await world.run("web", **CONTAINER))
        refused(await world.finished(await instances.start(world.context, "default", "db")), by="web")


@pytest.mark.parametrize(("first", "second"), [(MACHINE, CONTAINER), (CONTAINER, MACHINE), (MACHINE, MACHINE)])
@virtual
async def test_who_holds_it_is_known_after_a_restart(tmp_path: Path, first: Any, second: Any) -> None:
    async with with_machines(tmp_path) as (world, _):
        done(await world.run("first", **first))
        await world.agent_down()
        await world.agent_up()
        refused(await world.run("second", **second), by="first")
        assert world.running == {"first"}
        await stop(world, "first")
        done(await world.run("second", **second))


@virtual
async def test_who_was_refused_holds_nothing_after_a_restart(tmp_path: Path) -> None:
    """The daemon dies before it has undone what it made of the second: the first goes on, and may start again."""
    killer = Killer(at=0)
    async with with_machines(tmp_path, fault=lambda point: killer(point) if "release" in point else None) as (world, _):
        done(await world.run("web", **CONTAINER))
        killer.world = world
        second = await world.begin("db", **MACHINE)
        await world.until(lambda: world.life is not None and not world.life.alive)
        await world.agent_down()
        killer.world = None
        await world.agent_up()
        refused(await world.finished(second), by="web")
        assert world.running == {"web"}
        done(await world.finished(await instances.restart(world.context, "default", "web", None)))
        done(await world.run("copy", **SANDBOX))


@virtual
async def test_a_machine_cannot_have_a_disk_twice(tmp_path: Path) -> None:
    async with with_machines(tmp_path) as (world, _):
        mounts = [*DATA, {"kind": "volume", "source": "data", "target": "/again", "read_only": True}]
        operation = await world.run("db", isolation="vm", mounts=mounts)
        assert operation.error is not None
        assert operation.error["code"] == "invalid"
        assert "volume data is mounted twice" in str(operation.error["message"])
        done(await world.run("web", isolation="container", mounts=mounts))
