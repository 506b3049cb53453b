"""Random users, random deaths: whatever happens, nothing is lost, doubled or left over.

``make test-long`` runs ALVEOLE_TEST_SEEDS of them, 1000 by default.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from alveole.control import images, instances, networks, operations, volumes
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Desired, Instance, Phase
from tests.control_world import World, living
from tests.fakes import running
from tests.virtual import virtual

ORDINARY_SEEDS = 30
SEEDS = int(os.environ.get("ALVEOLE_TEST_SEEDS", "1000"))
COMMANDS = 40
ENDLESS = {("serve",), ("deaf",)}
NAMES = ("a", "b", "c", "d")
EXPECTED = frozenset(
    {ErrorCode.CONFLICT, ErrorCode.NOT_FOUND, ErrorCode.EXISTS, ErrorCode.INVALID, ErrorCode.UNAVAILABLE}
)


class Chaos:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.world: World | None = None
        self.deaths_left = 0
        self.asked: dict[str, str] = {}  # id of each instance that was wanted to stay -> name
        self.given_up: set[str] = set()  # ids of instances that somebody wanted removed

    def pause(self) -> float:
        return self.random.choice((0.0, 0.0, 0.001, 0.2))

    def fault(self, _point: str) -> None:
        """Now and then the agent dies at a step."""
        world = self.world
        if world is not None and world.life is not None and self.deaths_left and self.random.random() < 0.05:
            self.deaths_left -= 1
            world.life.kill()
            raise asyncio.CancelledError

    async def user(self, world: World) -> None:
        commands: list[Callable[[World, str], Awaitable[Any]]] = [
            self.run, self.run, self.run, self.start, self.stop, self.restart,
            self.remove, self.image, self.volume, self.network, self.cancel,
        ]  # fmt: skip
        try:
            await self.random.choice(commands)(world, self.random.choice(NAMES))
        except AlveoleError as error:
            if error.code not in EXPECTED:
                raise

    async def run(self, world: World, name: str) -> None:
        chosen = self.random.choice
        policy = chosen(("no", "on-failure", "always"))
        remove_on_exit = policy == "no" and chosen((True, False))
        operation = await world.begin(
            name,
            (chosen(("ok", "fail", "serve", "deaf", "missing")),),
            start=chosen((True, True, False)),
            image=chosen(("app", "app", "nowhere")),
            restart={"policy": policy, "max_retries": 2 if policy == "on-failure" else 0},
            network=chosen(("default", "host", "none", "net")),
            mounts=chosen(([], [{"kind": "volume", "source": "vol", "target": "/v"}])),
            remove_on_exit=remove_on_exit,
            stop_grace_s=chosen((0.0, 1.0)),
        )
        if not remove_on_exit:
            self.asked[operation.result["id"]] = name

    async def start(self, world: World, name: str) -> None:
        await instances.start(world.context, "default", name)

    async def stop(self, world: World, name: str) -> None:
        await instances.stop(world.context, "default", name, self.random.choice((None, 0.0, 0.5)))

    async def restart(self, world: World, name: str) -> None:
        await instances.restart(world.context, "default", name, None)

    async def remove(self, world: World, name: str) -> None:
        operation = await instances.remove(world.context, "default", name, force=self.random.random() < 0.7)
        self.given_up.add(operation.result["id"])

    async def image(self, world: World, _name: str) -> None:
        if self.random.random() < 0.5:
            await images.remove(world.context, "default", "app")
        else:
            await images.pull(world.context, "default", "app", tls_verify=True)

    async def volume(self, world: World, _name: str) -> None:
        if self.random.random() < 0.5:
            await volumes.remove(world.context, "default", "vol")
        else:
            await volumes.create(world.context, "default", "vol", 16 << 20)

    async def network(self, world: World, _name: str) -> None:
        if self.random.random() < 0.5:
            await networks.remove(world.context, "default", "net")
        else:
            await networks.create(world.context, "default", "net", None, internal=False)

    async def cancel(self, world: World, _name: str) -> None:
        known = world.records("operations")
        if known:
            await operations.cancel(world.context, "default", self.random.choice(known).id)

    async def disturb(self, world: World) -> None:
        """Kill the agent, the control plane with it, or neither; what has died is begun again."""
        died = self.random.random()
        if died < 0.1:
            await world.agent_down(kill=True)
            if died < 0.05:
                await world.control_down()
                await world.control_up()
        await self.revive(world)

    async def revive(self, world: World) -> None:
        while world.life is None or not world.life.alive:
            await world.agent_down(kill=True)
            await world.agent_up()


async def simulate(root: Path, seed: int) -> None:
    chaos = Chaos(seed)
    async with living(root, seed=seed, pause=chaos.pause, fault=chaos.fault) as world:
        chaos.world, chaos.deaths_left = world, 5
        for _ in range(COMMANDS):
            async with asyncio.TaskGroup() as users:
                for _ in range(chaos.random.choice((1, 1, 1, 3))):
                    users.create_task(chaos.user(world))
            await asyncio.sleep(chaos.random.choice((0.0, 0.01, 0.3, 2.0)))
            await chaos.disturb(world)
        chaos.deaths_left = 0
        await chaos.revive(world)
        await world.settle()
        world.check()
        check_intentions(world, chaos)


def check_intentions(world: World, chaos: Chaos) -> None:
    found = {instance.id: instance for instance in world.records("instances")}
    alive = running(world.host)
    for instance in found.values():
        check_instance(instance, runs=instance.id in alive)
    undone = {o.result.get("id") for o in world.records("operations") if o.state in {"failed", "cancelled"}}
    lost = set(chaos.asked) - chaos.given_up - undone - set(found)
    assert not lost, [chaos.asked[identifier] for identifier in lost]


def check_instance(instance: Instance, *, runs: bool) -> None:
    status, policy = instance.status, instance.spec.restart.policy
    if policy != "always" or instance.spec.command in ENDLESS:  # others may end or start at this moment
        assert runs == (status.phase is Phase.RUNNING), instance
    assert instance.desired is not Desired.REMOVED, f"{instance.name} was to be removed"
    if instance.desired is Desired.STOPPED:
        assert status.phase in {Phase.EXITED, Phase.CREATED, Phase.FAILED}, instance
    elif policy == "always":
        assert status.phase in {Phase.CREATING, Phase.RUNNING, Phase.BACKOFF, Phase.FAILED}, instance
    elif instance.spec.command in ENDLESS:
        assert runs or status.error, instance


@pytest.mark.parametrize("seed", [*range(ORDINARY_SEEDS), 475])  # 475: cancelled when a disk had just been made
def test_nothing_is_lost_or_doubled(seed: int, tmp_path: Path) -> None:
    virtual(simulate)(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ORDINARY_SEEDS, SEEDS))
def test_nothing_is_lost_or_doubled_by_many_more(seed: int, tmp_path: Path) -> None:
    virtual(simulate)(tmp_path, seed)
