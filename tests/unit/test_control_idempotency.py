"""A request repeated with its key is carried out once."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from alveole.control import commit, images, instances, networks, volumes
from alveole.control.commit import Idempotency
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import InstanceSpec
from alveole.model.operation import Operation
from tests.control_world import World, living
from tests.virtual import virtual

SPEC = InstanceSpec(image="app", command=("serve",))


async def create(world: World, name: str, idempotency: Idempotency) -> Operation:
    return await instances.create(world.context, "default", name, SPEC, start=True, idempotency=idempotency)


@virtual
async def test_the_same_request_returns_the_first_operation(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        key = Idempotency("k1", {"name": "web"})
        first = await world.finished(await create(world, "web", key))
        assert await create(world, "web", key) == first
        assert len(world.records("instances")) == 1


@virtual
async def test_another_request_with_the_key_is_refused(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await create(world, "web", Idempotency("k1", {"name": "web"}))
        with pytest.raises(AlveoleError, match="was used for another request") as refused:
            await create(world, "other", Idempotency("k1", {"name": "other"}))
        assert refused.value.code is ErrorCode.CONFLICT
        assert world.find("other") is None


@virtual
async def test_keys_of_projects_are_apart(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        key = Idempotency("k1", {})
        first = await create(world, "web", key)
        second = await instances.create(world.context, "other", "web", SPEC, start=True, idempotency=key)
        assert first.id != second.id


@virtual
async def test_at_the_same_time_one_is_carried_out(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        key = Idempotency("k1", {"name": None})
        operations = await asyncio.gather(
            *(instances.create(world.context, "default", None, SPEC, start=True, idempotency=key) for _ in range(20))
        )
        assert len({operation.id for operation in operations}) == 1
        assert len(world.records("instances")) == 1
        await world.settle()
        world.check()


@virtual
async def test_a_refused_request_does_not_use_its_key_up(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run("web")
        key = Idempotency("k1", {"name": "web"})
        with pytest.raises(AlveoleError, match="exists"):
            await create(world, "web", key)
        assert len(world.store._leases) == 0, "a lease that nothing is put under"
        await world.finished(await instances.remove(world.context, "default", "web", force=True))
        assert (await create(world, "web", key)).verb == "instance.run"


@virtual
async def test_a_key_is_forgotten_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit.IDEMPOTENCY_TTL_S == 24 * 3600
    monkeypatch.setattr(commit, "IDEMPOTENCY_TTL_S", 60)
    async with living(tmp_path) as world:
        key = Idempotency("k1", {})
        first = await networks.create(world.context, "default", "net", None, internal=False, idempotency=key)
        again = await networks.create(world.context, "default", "net", None, internal=False, idempotency=key)
        assert again == first
        await asyncio.sleep(62)
        with pytest.raises(AlveoleError, match="a network named net exists"):
            await networks.create(world.context, "default", "net", None, internal=False, idempotency=key)


@pytest.mark.parametrize("what", ["image", "volume", "network", "instance"])
@virtual
async def test_removals_are_repeatable(what: str, tmp_path: Path) -> None:
    """The client that lost the answer asks again when nothing is left to remove."""
    async with living(tmp_path) as world:
        context, key = world.context, Idempotency("gone", [what])
        await world.finished(await images.pull(context, "default", "app", tls_verify=True))
        await world.finished(await volumes.create(context, "default", "v", 16 << 20))
        await networks.create(context, "default", "n", None, internal=False)
        await world.run(command=("serve",), image="app") if what == "instance" else None
        requests: dict[str, Any] = {
            "image": lambda: images.remove(context, "default", "app", key),
            "volume": lambda: volumes.remove(context, "default", "v", key),
            "network": lambda: networks.remove(context, "default", "n", key),
            "instance": lambda: instances.remove(context, "default", "web", force=True, idempotency=key),
        }
        first = await world.finished(await requests[what]())
        assert first.state == "done"
        assert await requests[what]() == first
