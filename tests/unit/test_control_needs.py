"""What instances need: images, volumes, networks and addresses are made, shared, and given back."""

import asyncio
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from alveole.control import images, instances, keys, networks, volumes
from alveole.model.error import AlveoleError, ErrorCode, exhausted, unavailable
from alveole.model.image import Recipe
from alveole.model.operation import OperationState
from alveole.store.base import Put, TxnResult
from tests.control_world import World, living
from tests.virtual import virtual

DONE, FAILED = OperationState.DONE, OperationState.FAILED
VOLUME = [{"kind": "volume", "source": "data", "target": "/data"}]


@virtual
async def test_an_image_that_cannot_be_fetched_undoes_the_run(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        world.images.registry["docker.io/library/down:latest"] = unavailable("registry docker.io does not answer")
        operation = await world.run(image="down")
        assert operation.state is FAILED
        assert operation.error is not None
        assert operation.error["message"] == "registry docker.io does not answer"
        assert world.find() is None
        assert not world.records("images")
        world.check()
        assert (await world.run()).state is DONE, "the name is free again"


@virtual
async def test_an_image_is_fetched_once_for_all_who_wait(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        world.images.gate.clear()
        runs = await asyncio.gather(*(world.begin(f"web-{number}") for number in range(10)))
        world.images.gate.set()
        assert {(await world.finished(run)).state for run in runs} == {DONE}
        assert [o.verb for o in world.records("operations")].count("image.pull") == 1


@virtual
async def test_pull_policies(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        with pytest.raises(AlveoleError, match="image app is not on this host") as refused:
            await world.begin(pull="never")
        assert refused.value.code is ErrorCode.NOT_FOUND
        assert (await world.run("first")).state is DONE
        assert (await world.run("second", pull="never")).state is DONE
        assert (await world.run("third", pull="always")).state is DONE
        assert [o.verb for o in world.records("operations")].count("image.pull") == 2


@virtual
async def test_an_image_in_use_or_being_fetched_stays(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        world.images.gate.clear()
        pulling = await images.pull(world.context, "default", "app", tls_verify=True)
        with pytest.raises(AlveoleError, match="is being fetched") as refused:
            await images.remove(world.context, "default", "app")
        assert pulling.id in refused.value.hint
        world.images.gate.set()
        await world.run()
        with pytest.raises(AlveoleError, match="is used by web"):
            await images.remove(world.context, "default", "app")
        await world.finished(await instances.remove(world.context, "default", "web", force=True))
        removed = await world.finished(await images.remove(world.context, "default", "docker.io/library/app:latest"))
        assert removed.state is DONE
        assert removed.result["freed_bytes"] == 1000
        assert not world.images.held


@virtual
async def test_images_are_imported_and_built(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        context = world.context
        await world.finished(
            await images.load(context, "default", "mine", path="/tmp/x.tar", image_format="docker-archive")
        )
        recipe = Recipe(base="mine", command=("serve",))
        built = await world.finished(
            await images.build(context, "default", "made", recipe=recipe, directory="/tmp", use_cache=True)
        )
        assert built.state is DONE
        assert (await world.run(image="made", pull="never", command=("serve",))).state is DONE
        with pytest.raises(AlveoleError, match="base image nothing does not exist"):
            await images.build(context, "default", "x", recipe=Recipe(base="nothing"), directory="/tmp", use_cache=True)


@virtual
async def test_a_volume_that_cannot_be_made_undoes_the_run(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        world.volumes.refuse = exhausted("the volume pool is full")
        operation = await world.run(mounts=VOLUME)
        assert operation.state is FAILED
        assert operation.error is not None
        assert operation.error["code"] == "exhausted"
        assert "the volume pool is full" in operation.error["message"]
        assert world.find() is None
        world.check()
        world.volumes.refuse = None
        assert (await world.run(mounts=VOLUME)).state is DONE
        world.check()


@virtual
async def test_volumes_are_made_when_first_used_and_stay(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        assert (await world.run(mounts=VOLUME)).state is DONE
        with pytest.raises(AlveoleError, match="volume data is used by web"):
            await volumes.remove(world.context, "default", "data")
        assert world.volumes.mounted
        await world.finished(await instances.remove(world.context, "default", "web", force=True))
        assert not world.volumes.mounted
        assert world.volumes.disks
        assert (await world.finished(await volumes.remove(world.context, "default", "data"))).state is DONE
        assert not world.volumes.disks
        world.check()


@virtual
async def test_volumes_that_cannot_be(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        for name, size in (("Upper", 16 << 20), ("small", (16 << 20) - 1), ("", 16 << 20), ("a/b", 16 << 20)):
            with pytest.raises(AlveoleError) as refused:
                await volumes.create(world.context, "default", name, size)
            assert refused.value.code is ErrorCode.INVALID
        assert not world.records("volumes")


@virtual
async def test_disks_of_operating_systems_are_for_machines(tmp_path: Path) -> None:
    """A wall without a kernel of its own refuses one, and no recipe adds to it: both say what to do."""
    async with living(tmp_path) as world:
        load = await images.load(world.context, "default", "os", path="/tmp/x.qcow2", image_format="qcow2")
        assert (await world.finished(load)).state is DONE
        for isolation in ("container", "sandbox"):
            operation = await world.run(isolation, image="os", isolation=isolation)
            assert operation.state is FAILED
            assert operation.error is not None
            assert operation.error["message"].endswith(f"which a {isolation} cannot boot")
            assert operation.error["hint"] == "choose --isolation vm"
        recipe = Recipe(base="os", commands=(("true",),))
        with pytest.raises(AlveoleError, match="base image os is the disk") as refused:
            await images.build(world.context, "default", "x", recipe=recipe, directory="/", use_cache=True)
        assert refused.value.code is ErrorCode.INVALID
        world.check()


class Held:
    """Holds the next transaction back after it was decided, so that another passes it."""

    def __init__(self, world: World, patch: pytest.MonkeyPatch) -> None:
        self.waiting, self.go = asyncio.Event(), asyncio.Event()
        self._original = world.store.txn
        patch.setattr(world.store, "txn", self._txn)

    async def _txn(self, *parts: Any) -> TxnResult:
        if not self.waiting.is_set():
            self.waiting.set()
            await self.go.wait()
        return await self._original(*parts)


@pytest.mark.parametrize("first", ["create", "remove"])
@pytest.mark.parametrize("what", ["network", "volume"])
@virtual
async def test_removal_races_with_creation(
    what: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is decided first and written last: what an instance uses is never removed."""
    async with living(tmp_path) as world:
        context = world.context
        await images.pull(context, "default", "app", tls_verify=True)
        await networks.create(context, "default", "net", None, internal=False)
        await volumes.create(context, "default", "data", 16 << 20)
        await world.settle()

        async def create() -> Any:
            return await world.begin(network="net" if what == "network" else "none", mounts=VOLUME)

        async def remove() -> Any:
            module: Any = networks if what == "network" else volumes
            return await module.remove(context, "default", "net" if what == "network" else "data")

        slow, quick = (create, remove) if first == "create" else (remove, create)
        held = Held(world, monkeypatch)
        waiting = asyncio.create_task(slow())
        await held.waiting.wait()
        await asyncio.gather(quick(), return_exceptions=True)
        held.go.set()
        await asyncio.gather(waiting, return_exceptions=True)
        await world.settle()
        instance = world.find()
        if instance is not None:
            assert context.cache.get(keys.network("default", "net")) or what == "volume"
            assert context.cache.get(keys.volume("default", "data"))
            assert world.running == {"web"}
        world.check()


@virtual
async def test_a_network_in_use_stays_and_can_be_used_on(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await networks.create(world.context, "default", "net", None, internal=False)
        await world.run(network="net")
        with pytest.raises(AlveoleError, match="network net is used by web"):
            await networks.remove(world.context, "default", "net")
        assert (await world.run("second", network="net")).state is DONE
        with pytest.raises(AlveoleError, match="network other does not exist"):
            await world.begin("third", network="other")


@virtual
async def test_a_removal_cut_short_is_decided_again(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        for name in ("used", "unused"):
            await networks.create(world.context, "default", name, None, internal=False)
        await world.run(network="used")
        await world.agent_down()
        await world.control_down()
        for name in ("used", "unused"):
            entry = await world.store.get(keys.network("default", name))
            assert entry is not None
            marked = entry.value.replace(b'"removing":false', b'"removing":true')
            await world.store.txn((), (Put(key=entry.key, value=marked),))
        await world.control_up()
        await world.agent_up()
        await world.settle()
        assert {n.name: n.removing for n in world.records("networks")} == {"used": False}
        world.check()


@virtual
async def test_fifty_at_once_get_fifty_addresses(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        runs = await asyncio.gather(*(world.begin(f"web-{number}") for number in range(50)))
        assert {(await world.finished(run)).state for run in runs} == {DONE}
        addresses = {instance.address for instance in world.records("instances")}
        assert len(addresses) == 50
        subnet = IPv4Network(world.records("networks")[0].subnet)
        assert all(IPv4Address(address) in subnet for address in addresses)
        world.check()


@virtual
async def test_networks_made_at_once_do_not_overlap(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await asyncio.gather(
            *(networks.create(world.context, "default", f"n{n}", None, internal=False) for n in range(20))
        )
        subnets = [IPv4Network(network.subnet) for network in world.records("networks")]
        assert len(subnets) == 20
        assert not any(a.overlaps(b) for a in subnets for b in subnets if a != b)
        assert len(set(subnets)) == 20


@virtual
async def test_projects_do_not_see_each_other(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        spec = world.instance().spec
        other = await instances.create(world.context, "other", "web", spec, start=True)
        assert (await world.finished(other)).state is DONE
        assert len(world.records("networks")) == 2
        assert len({network.subnet for network in world.records("networks")}) == 2
        world.check()
