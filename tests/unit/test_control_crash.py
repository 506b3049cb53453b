"""The agent dies at every step of everything it does, one after the other, and what it began is brought to its end."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from alveole.control import instances, keys
from alveole.model.operation import Operation, OperationState
from alveole.store.base import Delete
from tests.control_world import World, living
from tests.virtual import virtual

VOLUME = [{"kind": "volume", "source": "data", "target": "/data"}]
Action = Callable[[World], Awaitable[Operation]]


async def _run(world: World) -> Operation:
    return await world.begin(mounts=VOLUME)


async def _stop(world: World) -> Operation:
    return await instances.stop(world.context, "default", "web", None)


async def _restart(world: World) -> Operation:
    return await instances.restart(world.context, "default", "web", None)


async def _remove(world: World) -> Operation:
    return await instances.remove(world.context, "default", "web", force=True)


ACTIONS: dict[str, Action] = {"run": _run, "stop": _stop, "restart": _restart, "rm": _remove}
RUNNING_AFTER = {"run": {"web"}, "stop": set(), "restart": {"web"}, "rm": set()}


class Killer:
    """Notes every step; kills the agent at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.points: list[str] = []
        self.world: World | None = None
        self._at = at

    def __call__(self, point: str) -> None:
        if self.world is None:
            return
        self.points.append(point)
        if len(self.points) - 1 == self._at and self.world.life is not None:
            self.world.life.kill()
            raise asyncio.CancelledError


async def carry_out(root: Path, name: str, killer: Killer) -> None:
    async with living(root, fault=killer, pause=lambda: 0.01) as world:
        if name != "run":
            await world.finished(await _run(world))
        killer.world = world
        operation = await ACTIONS[name](world)
        await world.until(
            lambda: world.operation(operation.id).state != "running" or world.life is None or not world.life.alive
        )
        if world.life is not None and not world.life.alive:
            begun = {identifier: task.started_at for identifier, task in world.host.tasks.items()}
            await world.agent_down()
            await world.agent_up()
            assert (await world.finished(operation)).state is OperationState.DONE, killer.points[-1]
            if name == "run" and any(begun.values()):
                now = {identifier: task.started_at for identifier, task in world.host.tasks.items()}
                assert now == begun, "what had begun was begun again"
        await world.settle()
        assert world.running == RUNNING_AFTER[name]
        world.check()


@pytest.mark.parametrize("name", ACTIONS)
def test_killed_at_every_step(name: str, tmp_path: Path) -> None:
    whole = Killer()
    virtual(carry_out)(tmp_path / "whole", name, whole)
    assert len(whole.points) >= 2
    for at in range(len(whole.points)):
        killer = Killer(at)
        virtual(carry_out)(tmp_path / str(at), name, killer)
        assert killer.points[at] == whole.points[at]


def test_a_restart_asked_for_while_a_start_is_not_known_yet_still_happens(tmp_path: Path) -> None:
    """A start that the agent did not live to remember is the run it was made for, not the newest one."""
    whole = Killer()
    virtual(carry_out)(tmp_path / "whole", "run", whole)
    killer = Killer(whole.points.index("start:start:after"))

    @virtual
    async def scenario() -> None:
        async with living(tmp_path / "killed", fault=killer, pause=lambda: 0.01) as world:
            killer.world = world
            await _run(world)
            await world.until(lambda: world.life is None or not world.life.alive)
            first = {identifier: task.started_at for identifier, task in world.host.tasks.items()}
            again = await _restart(world)
            await world.agent_down()
            await world.agent_up()
            assert (await world.finished(again)).state is OperationState.DONE
            await world.settle()
            second = {identifier: task.started_at for identifier, task in world.host.tasks.items()}
            assert second.keys() == first.keys()
            assert second != first
            world.check()

    scenario()


@virtual
async def test_what_no_record_knows_is_removed(tmp_path: Path) -> None:
    """As after the store was put back from a backup: process, files, network and id range go."""
    async with living(tmp_path) as world:
        await world.run("kept")
        await world.run("lost")
        lost = world.instance("lost")
        await world.agent_down()
        records = (keys.instance("default", "lost"), keys.address(lost.address))
        await world.store.txn((), tuple(Delete(key=key) for key in records))
        await asyncio.sleep(0.1)
        await world.agent_up()
        await asyncio.sleep(1)
        assert world.running == {"kept"}
        world.check()
