"""Records outlive daemons: restarts, newer versions, stale reports, and readers that come back."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from alveole.control import instances, keys
from alveole.control.events import events, parse_token, token
from alveole.control.nodes import LocalLink
from alveole.model.agent import InstanceReport, TaskReport
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Phase, Placement
from alveole.model.operation import OperationState
from alveole.store.base import Put
from tests.control_world import World, living
from tests.virtual import virtual


async def rewrite(world: World, key: str, **fields: Any) -> bytes:
    """Change a stored record as a newer version might."""
    found = await world.store.get(key)
    assert found is not None
    changed = json.dumps({**json.loads(found.value), **fields}).encode()
    await world.store.txn((), (Put(key=key, value=changed),))
    return changed


@virtual
async def test_control_begins_again_and_goes_on(tmp_path: Path) -> None:
    """Instances run on; an operation under way when it ended is carried to its end."""
    async with living(tmp_path) as world:
        await world.run("runs")
        world.images.gate.clear()
        waiting = await world.begin("waits", image="app", pull="always")
        await asyncio.sleep(0.1)
        began = world.instance("runs").status.started_at
        await world.agent_down(kill=False)
        await world.control_down()
        assert set(world.host.tasks), "instances outlive the daemon"
        await world.control_up()
        await world.agent_up()
        world.images.gate.set()
        assert (await world.finished(waiting)).state is OperationState.DONE
        assert world.running == {"runs", "waits"}
        assert world.instance("runs").status.started_at == began
        world.check()


@virtual
async def test_what_was_asked_while_the_agent_was_away_is_done(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        for name in ("a", "b", "c"):
            await world.run(name)
        await world.agent_down()
        stopping = await instances.stop(world.context, "default", "a", None)
        removing = await instances.remove(world.context, "default", "b", force=True)
        await world.agent_up()
        assert (await world.finished(stopping)).state is OperationState.DONE
        assert (await world.finished(removing)).state is OperationState.DONE
        await world.settle()
        assert world.running == {"c"}
        world.check()


@virtual
async def test_an_exit_while_the_agent_was_away_is_seen(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run("ends", ("fail",))
        await world.agent_down()
        await asyncio.sleep(10)
        await world.agent_up()
        await world.until(lambda: world.instance("ends").status.phase is Phase.EXITED, 5)
        assert world.instance("ends").status.exit_code == 3


@virtual
async def test_what_a_newer_version_wrote_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown value: the record is not rewritten, and its instance, files and volumes not taken for leftovers."""
    async with living(tmp_path) as world:
        await world.run("old")
        await world.run("newer", mounts=[{"kind": "volume", "source": "data", "target": "/data"}])
        found = world.instance("newer")
        await world.agent_down()
        spec = {**found.spec.model_dump(mode="json"), "isolation": "enclave"}
        written = await rewrite(world, keys.instance("default", "newer"), spec=spec)
        volume = await rewrite(world, keys.volume("default", "data"), phase="frozen")
        await world.control_down()
        await world.control_up()
        await world.agent_up()
        await asyncio.sleep(5)
        assert "newer is not readable by this version" in caplog.text
        for key, value in ((keys.instance("default", "newer"), written), (keys.volume("default", "data"), volume)):
            kept = await world.store.get(key)
            assert kept is not None
            assert kept.value == value
        assert found.id in world.host.tasks
        assert world.volumes.disks
        assert (tmp_path / "state/instances" / found.id).is_dir()
        with pytest.raises(AlveoleError):
            await world.begin("newer")
        assert (await world.run("another")).state is OperationState.DONE
        assert world.instance("another").address != found.address


@virtual
async def test_fields_of_a_newer_version_survive_a_rewrite(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        spec = {**world.instance().spec.model_dump(mode="json", exclude_none=True), "colour": "red"}
        await rewrite(world, keys.instance("default", "web"), spec=spec, wish={"deep": [1, {"x": None}]})
        await asyncio.sleep(0.1)
        await world.finished(await instances.stop(world.context, "default", "web", None))
        found = await world.store.get(keys.instance("default", "web"))
        assert found is not None
        stored = json.loads(found.value)
        assert stored["desired"] == "stopped"
        assert stored["spec"]["colour"] == "red"
        assert stored["wish"]["deep"][0] == 1


def report(world: World, **fields: Any) -> InstanceReport:
    instance = world.instance()
    assert instance.placement is not None
    parts = {
        "instance_id": instance.id,
        "epoch": instance.placement.epoch,
        "status": instance.status.replace(reason="from the report"),
        **fields,
    }
    return InstanceReport(project="default", name="web", **parts)


@pytest.mark.parametrize("stale", [{"epoch": 0}, {"epoch": 2}, {"instance_id": "0" * 12}, {"name": "gone"}])
@virtual
async def test_reports_of_who_does_not_hold_it_are_refused(stale: dict[str, Any], tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        before = world.instance()
        with pytest.raises(AlveoleError) as refused:
            await LocalLink(world.context).report_instance(report(world).replace(**stale))
        assert refused.value.code is ErrorCode.CONFLICT
        assert world.instance() == before


@virtual
async def test_a_report_older_than_the_last_changes_nothing(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        await world.finished(await instances.stop(world.context, "default", "web", None))
        before = world.instance()
        old = report(world, status=before.status.replace(observed_generation=1, phase=Phase.RUNNING), removed=True)
        await LocalLink(world.context).report_instance(old)
        assert world.instance() == before


@virtual
async def test_an_instance_placed_elsewhere_is_given_up(tmp_path: Path) -> None:
    """Another epoch: the agent ends what it holds, and leaves nothing."""
    async with living(tmp_path) as world:
        await world.run()
        instance = world.instance()
        placement = Placement(node="node-2", epoch=2).model_dump()
        await rewrite(world, keys.instance("default", "web"), placement=placement)
        await asyncio.sleep(5)
        assert not world.host.tasks
        assert not world.network.attachments
        assert not (tmp_path / "state/instances" / instance.id).exists()


@virtual
async def test_reports_on_what_was_cancelled_are_refused(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        operation = await world.run()
        late = TaskReport(project="default", operation_id=operation.id, finished=True)
        with pytest.raises(AlveoleError) as refused:
            await LocalLink(world.context).report_task(late)
        assert refused.value.code is ErrorCode.CANCELLED


async def take(stream: AsyncIterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(5):
        return [await anext(stream) for _ in range(count)]


@virtual
async def test_the_event_stream_goes_on_where_it_was_left(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        begin = world.context.cache.revision
        await world.run()
        await world.finished(await instances.remove(world.context, "default", "web", force=True))
        whole = events(world.store, "default", begin)
        seen = await take(whole, 12)
        kinds = {(event["kind"], event["action"]) for event in seen}
        assert {("instance", "created"), ("instance", "updated"), ("operation", "created")} <= kinds
        assert ("instance", "removed") in {(e["kind"], e["action"]) for e in [*seen, *await rest(whole)]}
        first_of_each = {event["revision"]: n for n, event in reversed(list(enumerate(seen)))}
        for revision, position in first_of_each.items():
            again = events(world.store, "default", parse_token(world.store, revision) - 1)
            assert await take(again, 12 - position) == seen[position:]


async def rest(stream: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is there already."""
    found = []
    while True:
        try:
            async with asyncio.timeout(0.5):
                found.append(await anext(stream))
        except TimeoutError:
            return found


@virtual
async def test_events_of_other_projects_are_not_told(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        begin = world.context.cache.revision
        await world.run()
        assert await rest(events(world.store, "other", begin)) == []


@virtual
async def test_history_that_is_gone_is_told(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        await world.store.compact(world.context.cache.revision)
        with pytest.raises(AlveoleError) as refused:
            await take(events(world.store, "default", 1), 1)
        assert refused.value.code is ErrorCode.GONE


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", ErrorCode.INVALID),
        ("abc", ErrorCode.INVALID),
        ("abc:", ErrorCode.INVALID),
        ("abc:-1", ErrorCode.INVALID),
        ("abc:²", ErrorCode.INVALID),
        ("abc:" + "9" * 5000, ErrorCode.INVALID),
        ("00000000:1", ErrorCode.GONE),
    ],
)
@virtual
async def test_tokens_of_others(text: str, code: ErrorCode, tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(AlveoleError) as refused:
        parse_token(world.store, text)
    assert refused.value.code is code
    assert parse_token(world.store, token(world.store, 42)) == 42


@virtual
async def test_a_reader_that_falls_behind_is_told_to_list_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with living(tmp_path) as world:
        with world.context.cache.subscribe() as subscription:
            subscription.queue = asyncio.Queue(3)
            await world.run()
            with pytest.raises(AlveoleError) as refused:
                await take(subscription.updates(), 100)  # type: ignore[arg-type]
            assert refused.value.code is ErrorCode.GONE


@virtual
async def test_the_picture_is_whole_again_after_history_was_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The store drops a watcher that is too far behind: the cache lists again and misses nothing."""
    async with living(tmp_path) as world:
        await world.run()
        for number in range(1500):  # nobody else runs meanwhile
            await world.store.txn((), (Put(key=f"projects/default/x/{number}", value=b"1"),))
        await world.context.cache.reached(world.store._revision)
        assert "the store's history was lost" in caplog.text
        assert len(world.context.cache.names("projects/default/x/")) == 1500
        assert (await world.run("after")).state is OperationState.DONE


@virtual
async def test_who_falls_behind_lists_again(tmp_path: Path) -> None:
    """The agent and the reconciler whose queue of changes overflowed miss nothing, and touch nothing that runs."""
    async with living(tmp_path) as world:
        await world.run("stays")
        await world.run("goes")
        began = world.instance("stays").status.started_at
        for subscription in tuple(world.context.cache._subscriptions):
            while not subscription.queue.full():
                subscription.queue.put_nowait(None)
        await instances.remove(world.context, "default", "goes", force=True)
        await world.run("comes")
        await asyncio.sleep(5)
        assert world.running == {"stays", "comes"}
        assert world.instance("stays").status.started_at == began
        world.check()
