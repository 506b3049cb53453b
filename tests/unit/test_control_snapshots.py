"""Snapshots: made and removed as tasks, instances that begin from them, and what is refused."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from alveole.control import instances, operations, snapshots
from alveole.control.schedules import set_schedule
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Schedule
from alveole.model.operation import Operation, OperationState
from alveole.model.snapshot import Snapshot
from tests.control_world import World, living
from tests.virtual import virtual

DONE, FAILED = OperationState.DONE, OperationState.FAILED
VOLUME = [{"kind": "volume", "source": "data", "target": "/data"}]


async def take(world: World, name: str | None = "kept", ref: str = "web", *, memory: bool = False) -> Operation:
    return await world.finished(await snapshots.create(world.context, "default", ref, name=name, memory=memory))


async def restore(world: World, name: str = "kept", ref: str | None = None) -> Operation:
    return await world.finished(await snapshots.restore(world.context, "default", name, ref))


async def fork(world: World, new: str | None = "young", name: str = "kept") -> Operation:
    return await world.finished(await snapshots.fork(world.context, "default", name, new=new))


async def remove(world: World, name: str = "kept") -> Operation:
    return await world.finished(await snapshots.remove(world.context, "default", name))


def kept(world: World) -> list[Snapshot]:
    return world.records("snapshots")


def upper(world: World, name: str = "web") -> Path:
    return world.root / "state/instances" / world.instance(name).id / "upper"


@virtual
async def test_an_instance_goes_back(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        (upper(world) / "state").write_text("old")
        assert (await take(world)).state is DONE
        assert [(s.name, s.phase, s.instance, s.memory) for s in kept(world)] == [("kept", "ready", "web", False)]
        (upper(world) / "state").write_text("new")
        before = world.instance()
        assert (await restore(world)).state is DONE
        after = world.instance()
        assert (after.id, after.address, after.renewal) == (before.id, before.address, before.renewal + 1)
        assert after.origin is not None
        assert (after.origin.snapshot, after.origin.memory) == ("kept", False)
        assert (upper(world) / "state").read_text() == "old"
        assert world.running == {"web"}
        await world.finished(await instances.recreate(world.context, "default", "web"))
        assert world.instance().origin is None
        assert not (upper(world) / "state").exists()
        assert (await remove(world)).state is DONE
        assert not kept(world)
        world.check()


@virtual
async def test_another_begins_from_it_with_volumes_of_its_own(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run(mounts=VOLUME, ports=[{"host_port": 8080, "instance_port": 80}])
        await take(world)
        assert (await fork(world)).state is DONE
        young = world.instance("young")
        assert [mount.source for mount in young.spec.mounts] == ["young-data"]
        assert young.spec.ports == ()
        assert {volume.name: volume.phase for volume in world.records("volumes")} == {
            "data": "ready",
            "young-data": "ready",
        }
        with pytest.raises(AlveoleError, match="an instance named young exists"):
            await fork(world)
        await remove(world)
        assert world.running == {"web", "young"}
        world.check()


@virtual
async def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run(mounts=VOLUME)
        world.volumes.disks.clear()
        failed = await take(world)
        assert failed.state is FAILED
        assert failed.error is not None
        assert "has no disk" in failed.error["message"]
        assert not kept(world)
        assert not list((tmp_path / "state/snapshots").iterdir())
        assert world.running == {"web"}
        assert not {name for name in world.volumes.roots if name.startswith("snapshot")}


@virtual
async def test_refusals(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.finished(await world.begin("idle", start=False))

        async def refused(code: ErrorCode, words: str, call: Any) -> None:
            with pytest.raises(AlveoleError, match=words) as error:
                await call
            assert error.value.code is code

        await refused(ErrorCode.CONFLICT, "nothing to keep", take(world, ref="idle"))
        await refused(ErrorCode.NOT_FOUND, "does not exist", take(world, ref="nobody"))
        await world.run()
        await refused(ErrorCode.CONFLICT, "cannot be kept with its memory", take(world, memory=True))
        await refused(ErrorCode.INVALID, "not a name", take(world, name="A b"))
        await take(world)
        await refused(ErrorCode.EXISTS, "a snapshot named kept exists", take(world))
        await refused(ErrorCode.CONFLICT, "is not of instance idle", restore(world, ref="idle"))
        for call in (restore, fork, remove):
            await refused(ErrorCode.NOT_FOUND, "snapshot none does not exist", call(world, name="none"))
        assert len(kept(world)) == 1


@virtual
async def test_without_a_name_it_has_the_time_in_it(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        await take(world, name=None)
        (made,) = kept(world)
        assert made.name == f"web-{made.created_at:%Y%m%d-%H%M%S}"
        assert (await take(world, name=None)).state is DONE
        assert len({snapshot.name for snapshot in kept(world)}) == 2


@virtual
async def test_cancelled_it_leaves_nothing_and_its_removal_cannot_be_cancelled(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        begun = await snapshots.create(world.context, "default", "web", name="kept", memory=False)
        assert kept(world)[0].phase == "creating"
        with pytest.raises(AlveoleError, match="is creating"):
            await restore(world)
        await operations.cancel(world.context, "default", begun.id)
        await world.settle()
        assert not kept(world)
        world.check()
        await take(world)
        removing = await snapshots.remove(world.context, "default", "kept")
        with pytest.raises(AlveoleError, match="cannot be cancelled"):
            await operations.cancel(world.context, "default", removing.id)


@virtual
async def test_its_image_stays_and_a_new_daemon_knows_it(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        await take(world)
        (tmp_path / "state/snapshots/0123456789ab.new").mkdir()
        await world.finished(await instances.remove(world.context, "default", "web", force=True))
        await world.agent_down()
        await world.agent_up()
        assert not (tmp_path / "state/snapshots/0123456789ab.new").exists()
        used = await world.life.engine.link.used_images() if world.life else ()
        assert kept(world)[0].image in used
        assert (await fork(world)).state is DONE
        world.check()


@virtual
async def test_a_schedule_takes_them_and_keeps_the_latest(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        await take(world, "by-hand")
        await set_schedule(world.context, "default", "web", Schedule(every_s=60, keep=3))
        await asyncio.sleep(601)
        await world.settle()
        taken = sorted((s for s in kept(world) if s.scheduled), key=lambda s: s.created_at)
        assert len(taken) == 3
        assert [(b.created_at - a.created_at).total_seconds() // 1 for a, b in pairwise(taken)] == [60, 60]
        assert "by-hand" in {s.name for s in kept(world)}
        await set_schedule(world.context, "default", "web", None)
        await asyncio.sleep(200)
        assert {s.name for s in kept(world) if s.scheduled} == {s.name for s in taken}
        world.check()


@virtual
async def test_a_schedule_rests_while_it_does_not_run_and_tries_again_after_a_failure(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run(mounts=VOLUME)
        disks = set(world.volumes.disks)
        world.volumes.disks.clear()
        await set_schedule(world.context, "default", "web", Schedule(every_s=3600, keep=1))
        await asyncio.sleep(10)
        tried = [o for o in world.records("operations") if o.verb == "snapshot.create"]
        assert [o.state for o in tried] == [FAILED]
        world.volumes.disks |= disks
        await asyncio.sleep(61)
        assert len(kept(world)) == 1
        await world.finished(await instances.stop(world.context, "default", "web", 0))
        await asyncio.sleep(8000)
        assert len(kept(world)) == 1
        with pytest.raises(AlveoleError, match="only a running one"):
            await set_schedule(world.context, "default", "web", Schedule(every_s=60, keep=1, memory=True))


@virtual
async def test_files_are_not_begun_anew_because_the_record_of_that_was_lost(tmp_path: Path) -> None:
    """As by a power cut: the agent's own record is not waited for to reach the disk."""
    async with living(tmp_path) as world:
        await world.run()
        await take(world)
        await fork(world)
        await restore(world)
        await world.finished(await instances.recreate(world.context, "default", "web"))
        for name in ("web", "young"):
            (upper(world, name) / "written").write_text("since")
            await world.finished(await instances.stop(world.context, "default", name, 0))
        await world.agent_down()
        for record in (world.root / "state/instances").glob("*/local.json"):
            record.write_text("")
        await world.agent_up()
        for name in ("web", "young"):
            assert (await world.finished(await instances.start(world.context, "default", name))).state is DONE
            assert (upper(world, name) / "written").read_text() == "since"
