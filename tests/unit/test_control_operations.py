"""Operations are cancelled, time out, and are forgotten, and what they began is undone."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from alveole.control import images, instances, operations, volumes
from alveole.control.commit import finished, new_operation, put
from alveole.control.keys import operation as operation_key
from alveole.control.query import wait_operation
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Desired
from alveole.model.operation import Operation, OperationState
from tests.control_world import World, living
from tests.virtual import virtual


async def cancel(world: World, operation: Operation) -> Operation:
    return await operations.cancel(world.context, "default", operation.id)


@virtual
async def test_a_run_cancelled_at_any_moment_leaves_nothing(tmp_path: Path) -> None:
    """In every state: before its image, while it is placed, in each step of its start."""
    for number in range(12):
        async with living(tmp_path / str(number), pause=lambda: 0.1) as world:
            operation = await world.begin()
            await asyncio.sleep(number * 0.1)
            if world.operation(operation.id).state is not OperationState.RUNNING:
                break
            cancelled = await cancel(world, operation)
            assert cancelled.state is OperationState.CANCELLED
            assert cancelled.error is not None
            assert cancelled.error["code"] == "cancelled"
            await world.settle()
            assert world.find() is None
            assert not world.host.tasks
            world.check()
    assert 5 <= number < 11, "the moments were not spread over the run"


@virtual
async def test_a_cancelled_start_ends_what_it_began(tmp_path: Path) -> None:
    async with living(tmp_path, pause=lambda: 0.1) as world:
        await world.finished(await world.begin(start=False))
        starting = await instances.start(world.context, "default", "web")
        await asyncio.sleep(0.35)
        assert (await cancel(world, starting)).state is OperationState.CANCELLED
        await world.settle()
        assert world.instance().desired is Desired.STOPPED
        assert world.running == set()
        world.check()


@pytest.mark.parametrize("verb", ["stop", "rm"])
@virtual
async def test_what_ends_an_instance_cannot_be_cancelled(verb: str, tmp_path: Path) -> None:
    async with living(tmp_path, pause=lambda: 0.1) as world:
        await world.run(command=("deaf",))
        operation = await (
            instances.stop(world.context, "default", "web", None)
            if verb == "stop"
            else instances.remove(world.context, "default", "web", force=True)
        )
        with pytest.raises(AlveoleError, match=f"instance.{verb} cannot be cancelled") as refused:
            await cancel(world, operation)
        assert refused.value.code is ErrorCode.CONFLICT
        assert (await world.finished(operation)).state is OperationState.DONE


@virtual
async def test_a_removed_volume_never_comes_back(tmp_path: Path) -> None:
    """Its removal cannot be cancelled, and when it took too long it can only be asked for again."""
    async with living(tmp_path, pause=lambda: 0.1) as world:
        await world.finished(await volumes.create(world.context, "default", "data", 16 << 20))
        await world.agent_down()
        removing = await volumes.remove(world.context, "default", "data")
        with pytest.raises(AlveoleError, match="cannot be cancelled"):
            await cancel(world, removing)
        with pytest.raises(AlveoleError, match="volume data is removing"):
            await volumes.remove(world.context, "default", "data")
        assert (await world.finished(removing)).state is OperationState.FAILED, "its time is over"
        with pytest.raises(AlveoleError, match="volume data is being removed"):
            await world.begin(mounts=[{"kind": "volume", "source": "data", "target": "/data"}])
        await world.agent_up()
        again = await volumes.remove(world.context, "default", "data")
        assert (await world.finished(again)).state is OperationState.DONE
        world.check()


@virtual
async def test_what_is_over_cannot_be_cancelled(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        operation = await world.run()
        with pytest.raises(AlveoleError, match="is already done"):
            await cancel(world, operation)
        with pytest.raises(AlveoleError, match="does not exist"):
            await operations.cancel(world.context, "default", "0")


@virtual
async def test_a_cancelled_pull_ends_who_waits_for_it(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        world.images.gate.clear()
        pulling = await images.pull(world.context, "default", "app", tls_verify=True)
        running = await world.begin()
        await cancel(world, pulling)
        ended = await world.finished(running)
        assert ended.state is OperationState.CANCELLED
        assert world.find() is None
        assert not world.records("images")
        world.images.gate.set()
        await world.settle()
        assert not world.records("images"), "the agent went on with it"


@virtual
async def test_a_task_that_takes_too_long_fails(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        world.volumes.gate.clear()
        operation = await volumes.create(world.context, "default", "data", 16 << 20)
        before = world.clock.now()
        ended = await world.finished(operation)
        assert ended.state is OperationState.FAILED
        assert ended.error is not None
        assert ended.error["code"] == "timeout"
        assert "300 s" in ended.error["message"]
        assert world.clock.now() - before < timedelta(seconds=volumes.TASK_DEADLINE_S + 3)
        assert not world.records("volumes")
        world.volumes.gate.set()
        await world.settle()
        world.check()


@virtual
async def test_a_wait_ends_with_its_time(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        world.images.gate.clear()
        operation = await world.begin()
        before = world.clock.now()
        assert (await world.finished(operation, 5)).state is OperationState.RUNNING
        assert world.clock.now() - before == timedelta(seconds=5)
        with pytest.raises(AlveoleError, match="operation 0 does not exist"):
            await wait_operation(world.context.cache, "default", "0", 1)


@virtual
async def test_progress_is_told_while_a_task_is_under_way(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        world.images.gate.clear()
        operation = await images.pull(world.context, "default", "app", tls_verify=True)
        await asyncio.sleep(1)
        assert world.operation(operation.id).progress == "layer 1/1"
        world.images.gate.set()
        assert (await world.finished(operation)).progress == ""


@virtual
async def test_only_the_latest_operations_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "KEPT", 5)
    async with living(tmp_path) as world:
        world.images.gate.clear()
        under_way = await images.pull(world.context, "default", "app", tls_verify=True)
        made = []
        for number in range(12):
            await asyncio.sleep(0.002)
            operation = finished(world.context, new_operation(world.context, "default", "test", f"test/{number}"))
            await world.store.txn((), (put(operation_key("default", operation.id), operation),))
            made.append(operation.id)
        await asyncio.sleep(2)
        kept = {operation.id for operation in world.records("operations")}
        assert kept == {under_way.id, *made[-5:]}
        world.images.gate.set()


@virtual
async def test_a_run_that_ends_at_once_has_the_steps_of_its_start(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        operation = await world.run(command=("quick",))
        assert [step.name for step in operation.steps] == ["image", "network", "root", "mounts", "create", "start"]
