"""What users ask of instances ends, in records and on the host, as they asked."""

from pathlib import Path
from typing import Any

import pytest

from alveole.control import instances, keys
from alveole.control.query import list_instances, resolve_instance, wait_instance
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Phase
from alveole.model.operation import OperationState
from tests.control_world import living
from tests.virtual import virtual

DONE, FAILED, CANCELLED = OperationState.DONE, OperationState.FAILED, OperationState.CANCELLED


@virtual
async def test_run_stop_start_restart_rm(tmp_path: Path) -> None:
    async with living(tmp_path, pause=lambda: 0.01) as world:
        context = world.context
        ran = await world.run()
        assert ran.state is DONE
        assert ran.result == {"id": world.instance().id, "name": "web"}
        assert world.instance().status.phase is Phase.RUNNING
        assert world.running == {"web"}
        stopped = await world.finished(await instances.stop(context, "default", "web", None))
        assert stopped.state is DONE
        assert world.instance().status.phase is Phase.EXITED
        assert world.instance().status.reason == "stopped"
        assert world.running == set()
        assert (await world.finished(await instances.start(context, "default", "web"))).state is DONE
        began = world.instance().status.started_at
        assert world.running == {"web"}
        assert (await world.finished(await instances.restart(context, "default", "web", None))).state is DONE
        assert world.instance().status.started_at != began
        assert world.running == {"web"}
        removed = await world.finished(await instances.remove(context, "default", "web", force=True))
        assert removed.state is DONE
        assert world.find() is None
        assert not world.host.tasks
        world.check()


@virtual
async def test_create_makes_and_does_not_start(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        created = await world.finished(await world.begin(start=False))
        assert (created.verb, created.state) == ("instance.create", DONE)
        assert world.instance().status.phase is Phase.CREATED
        assert world.running == set()
        assert (await world.finished(await instances.start(world.context, "default", "web"))).state is DONE
        assert world.running == {"web"}


@virtual
async def test_status_and_outcome_are_one_revision(tmp_path: Path) -> None:
    """Whoever sees the operation done sees the instance run."""
    async with living(tmp_path) as world:
        operation = await world.run()
        ended = world.context.cache.get(keys.operation("default", operation.id))
        instance = world.context.cache.get(keys.instance("default", "web"))
        assert ended is not None
        assert instance is not None
        assert ended.revision == instance.revision


@virtual
async def test_an_operation_tells_its_steps(tmp_path: Path) -> None:
    async with living(tmp_path, pause=lambda: 0.01) as world:
        steps = (await world.run()).steps
        assert [step.name for step in steps] == ["image", "network", "root", "mounts", "create", "start"]
        assert all(step.duration_ms is not None and step.duration_ms >= 0 for step in steps)
        assert sum(step.duration_ms or 0 for step in steps) > 30


@virtual
async def test_a_command_that_does_not_exist_fails_the_run_and_frees_the_name(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        operation = await world.run(command=("missing",))
        assert operation.state is FAILED
        assert operation.error is not None
        assert (operation.error["code"], operation.error["field"]) == ("invalid", "command")
        await world.settle()
        assert world.find() is None
        world.check()
        assert (await world.run()).state is DONE


@virtual
async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        ports = [{"host_port": 8080, "instance_port": 80}]
        assert (await world.run("first", ports=ports)).state is DONE
        second = await world.run("second", ports=ports)
        assert second.state is FAILED
        assert second.error is not None
        assert second.error["code"] == "exists"
        assert "8080" in second.error["message"]
        await world.settle()
        world.check()


@virtual
async def test_a_start_that_fails_keeps_the_instance(tmp_path: Path) -> None:
    """Only a run is undone: what existed before the request exists after it."""
    async with living(tmp_path) as world:
        await world.finished(await world.begin(command=("missing",), start=False))
        started = await world.finished(await instances.start(world.context, "default", "web"))
        assert started.state is FAILED
        assert world.instance().status.phase is Phase.FAILED
        assert (world.instance().status.error or {})["code"] == "invalid"


@virtual
async def test_stop_ends_what_ignores_its_signal(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run(command=("deaf",), stop_grace_s=3.0)
        before = world.clock.now()
        await world.finished(await instances.stop(world.context, "default", "web", None))
        assert 3.0 <= (world.clock.now() - before).total_seconds() < 3.5
        assert world.instance().status.exit_code == 137


@virtual
async def test_a_stop_that_takes_long_is_hurried_by_rm_force(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run(command=("deaf",), stop_grace_s=1000.0)
        stopping = await instances.stop(world.context, "default", "web", None)
        removing = await instances.remove(world.context, "default", "web", force=True)
        before = world.clock.now()
        assert (await world.finished(removing)).state is DONE
        assert (world.clock.now() - before).total_seconds() < 1
        assert world.operation(stopping.id).state is CANCELLED
        world.check()


@pytest.mark.parametrize("second", ["stop", "restart", "rm"])
@virtual
async def test_a_request_supersedes_the_one_under_way(second: str, tmp_path: Path) -> None:
    async with living(tmp_path, pause=lambda: 0.1) as world:
        first = await world.begin()
        requests: dict[str, Any] = {
            "stop": lambda: instances.stop(world.context, "default", "web", None),
            "restart": lambda: instances.restart(world.context, "default", "web", None),
            "rm": lambda: instances.remove(world.context, "default", "web", force=True),
        }
        operation = await requests[second]()
        superseded = world.operation(first.id)
        assert superseded.state is CANCELLED
        assert superseded.error is not None
        assert superseded.error["message"] == f"superseded by instance.{second}"
        assert (await world.finished(operation)).state is DONE
        await world.settle()
        assert world.running == ({"web"} if second == "restart" else set())
        world.check()


@virtual
async def test_rm_refuses_what_runs_and_says_how(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        with pytest.raises(AlveoleError, match="web is running") as refused:
            await instances.remove(world.context, "default", "web", force=False)
        assert refused.value.code is ErrorCode.CONFLICT
        assert "alveole rm -f web" in refused.value.hint
        assert world.running == {"web"}


@virtual
async def test_what_is_being_removed_takes_no_other_request(tmp_path: Path) -> None:
    async with living(tmp_path, pause=lambda: 0.1) as world:
        await world.run(command=("deaf",), stop_grace_s=5.0)
        removing = await instances.remove(world.context, "default", "web", force=True)
        for request in (
            instances.start(world.context, "default", "web"),
            instances.stop(world.context, "default", "web", None),
            instances.remove(world.context, "default", "web", force=True),
        ):
            with pytest.raises(AlveoleError, match="is being removed"):
                await request
        assert (await world.finished(removing)).state is DONE


@virtual
async def test_start_of_what_runs_changes_nothing(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        before = world.instance()
        operation = await instances.start(world.context, "default", "web")
        assert operation.state is DONE
        assert world.instance() == before


@virtual
async def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run()
        with pytest.raises(AlveoleError, match="an instance named web exists") as refused:
            await world.begin()
        assert refused.value.code is ErrorCode.EXISTS


@virtual
async def test_names_are_made_of_the_image(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        first, second = await world.begin(None), await world.begin(None)
        assert first.target != second.target
        assert first.target.startswith("instance/app-")


@virtual
async def test_remove_on_exit(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        assert (await world.run(command=("ok",), remove_on_exit=True)).state is DONE
        outcome = await wait_instance(world.context.cache, "default", "web", 60)
        assert outcome == {"finished": True, "exit_code": 0, "reason": "exited"}
        await world.settle()
        assert world.find() is None
        world.check()


@virtual
async def test_restart_policy_counts_and_gives_up(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run(command=("fail",), restart={"policy": "on-failure", "max_retries": 3})
        outcome = await wait_instance(world.context.cache, "default", "web", 600)
        assert outcome["exit_code"] == 3
        assert world.instance().status.restarts == 3
        assert world.instance().status.phase is Phase.EXITED


@virtual
async def test_always_is_ended_by_a_stop(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        await world.run(command=("fail",), restart={"policy": "always"})
        await world.until(lambda: world.instance().status.restarts >= 4)
        assert (await wait_instance(world.context.cache, "default", "web", 5)) == {"finished": False}
        await world.finished(await instances.stop(world.context, "default", "web", None))
        restarts = world.instance().status.restarts
        await world.settle()
        assert world.instance().status.restarts == restarts
        assert world.running == set()


@virtual
async def test_instances_are_found_by_name_id_and_prefix(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        for name in ("web", "web-2", "db"):
            await world.run(name, labels={"tier": name[:2]}, network="none")
        cache = world.context.cache
        assert resolve_instance(cache, "default", "web").record.name == "web", "a name before a prefix"
        assert resolve_instance(cache, "default", "d").record.name == "db"
        assert resolve_instance(cache, "default", world.instance("web-2").id).record.name == "web-2"
        for ref, code in (("we", ErrorCode.CONFLICT), ("x", ErrorCode.NOT_FOUND), ("", ErrorCode.NOT_FOUND)):
            with pytest.raises(AlveoleError) as refused:
                resolve_instance(cache, "default", ref)
            assert refused.value.code is code
        with pytest.raises(AlveoleError, match="web, web-2"):
            resolve_instance(cache, "default", "we")
        assert [i.name for i in list_instances(cache, "default", ["label=tier=we", "phase=running"])] == [
            "web",
            "web-2",
        ]
        assert list_instances(cache, "default", ["label=tier", "name=db", "isolation=container", "network=none"])
        assert list_instances(cache, "default", ["label=tier=w"]) == []
        with pytest.raises(AlveoleError, match="is not a filter"):
            list_instances(cache, "default", ["colour=red"])


@virtual
async def test_an_instance_no_node_can_run_fails_and_says_why(tmp_path: Path) -> None:
    async with living(tmp_path, isolations=("container",)) as world:
        operation = await world.run(isolation="sandbox")
        assert operation.state is FAILED
        assert operation.error is not None
        assert operation.error["code"] == "unsupported"
        assert "node-1: cannot run isolation sandbox" in operation.error["message"]
        assert world.find() is None
