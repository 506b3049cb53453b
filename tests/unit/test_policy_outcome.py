"""Operations end, instances are placed, and health is judged by pure rules."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.model.health import Health, HealthCheck
from alveole.model.instance import Desired, Instance, InstanceSpec, InstanceStatus, Phase, Resources
from alveole.model.node import Node
from alveole.model.operation import Operation
from alveole.policy.health import HealthState, judge
from alveole.policy.outcome import outcome
from alveole.policy.place import NoFit, place

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def result(verb: str, phase: Phase, *, run: int = 1, seen: int = 3, asked: int = 3) -> str:
    instance = Instance(
        id="0" * 12,
        name="web",
        spec=InstanceSpec(image="app"),
        created_at=NOW,
        desired=Desired.RUNNING,
        run=1,
        generation=3,
    )
    operation = Operation(id="1", verb=verb, target="instance/web", generation=asked, created_at=NOW)
    return outcome(operation, instance, InstanceStatus(phase=phase, run=run, observed_generation=seen))


STARTING = ("instance.run", "instance.start", "instance.restart")


@pytest.mark.parametrize("verb", STARTING)
@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (Phase.PENDING, "under way"),
        (Phase.CREATING, "under way"),
        (Phase.RUNNING, "done"),
        (Phase.BACKOFF, "done"),
        (Phase.EXITED, "done"),
        (Phase.CREATED, "under way"),
        (Phase.FAILED, "failed"),
    ],
)
def test_a_start_is_over_when_this_run_has_begun(verb: str, phase: Phase, expected: str) -> None:
    assert result(verb, phase) == expected
    assert result(verb, phase, run=0) == "under way", "that was a former run"


@pytest.mark.parametrize("verb", ["instance.stop", "instance.create"])
def test_a_stop_is_over_when_nothing_runs(verb: str) -> None:
    over = {phase for phase in Phase if result(verb, phase) == "done"}
    assert over == {Phase.EXITED, Phase.CREATED, Phase.FAILED}


@pytest.mark.parametrize("phase", Phase)
def test_removal_is_not_over_while_there_is_a_status(phase: Phase) -> None:
    assert result("instance.rm", phase) == "under way"


@given(st.sampled_from([*STARTING, "instance.stop", "instance.create", "instance.rm"]), st.sampled_from(Phase))
def test_what_was_seen_before_the_request_says_nothing(verb: str, phase: Phase) -> None:
    assert result(verb, phase, seen=2) == "under way"


def node(name: str, **fields: Any) -> Node:
    parts = {"cpus": 4, "memory_bytes": 8 << 30, "isolations": ("container",), **fields}
    return Node(name=name, boot_id="b", registered_at=NOW, **parts)


SPEC = InstanceSpec(image="app")


def test_the_first_node_that_fits_is_chosen() -> None:
    assert place(SPEC, [node("b"), node("a")]) == "a"
    assert place(SPEC, [node("b"), node("a", isolations=())]) == "b"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (SPEC.replace(isolation="sandbox"), "cannot run isolation sandbox: runsc is not installed"),
        (SPEC.replace(resources=Resources(memory_bytes=9 << 30)), "memory limit of 9216 MiB exceeds"),
        (SPEC.replace(resources=Resources(cpus=4.5)), "4.5 CPUs exceed the node's 4"),
    ],
)
def test_no_node_fits_and_each_says_why(spec: InstanceSpec, reason: str) -> None:
    answer = place(spec, [node("a", lacking={"sandbox": "runsc is not installed"})])
    assert isinstance(answer, NoFit)
    assert str(answer).startswith("a: ")
    assert reason in str(answer)


def test_limits_equal_to_the_node_fit() -> None:
    assert place(SPEC.replace(resources=Resources(memory_bytes=8 << 30, cpus=4)), [node("a")]) == "a"


def test_without_nodes_that_is_said() -> None:
    assert str(place(SPEC, [])) == "no node is registered"


CHECK = HealthCheck(command=("true",), retries=3, start_period_s=10)


def judged(results: str, *, running_s: float = 100.0) -> HealthState:
    state = HealthState()
    for mark in results:
        state = judge(state, CHECK, passed=mark == "+", running_s=running_s)
    return state


@pytest.mark.parametrize(
    ("results", "health"),
    [
        ("", Health.STARTING),
        ("-", Health.STARTING),
        ("--", Health.STARTING),
        ("---", Health.UNHEALTHY),
        ("+", Health.HEALTHY),
        ("+--", Health.HEALTHY),
        ("+---", Health.UNHEALTHY),
        ("+--+--", Health.HEALTHY),
        ("---+", Health.HEALTHY),
        ("----", Health.UNHEALTHY),
    ],
)
def test_health_after_these_results(results: str, health: Health) -> None:
    assert judged(results).health is health


def test_failures_within_the_start_period_do_not_count() -> None:
    assert judged("-----", running_s=9.9) == HealthState()
    assert judged("+---", running_s=9.9).health is Health.UNHEALTHY, "it was healthy once"


@given(st.text("+-", max_size=30))
def test_unhealthy_is_exactly_three_failures_in_a_row(results: str) -> None:
    assert (judged(results).health is Health.UNHEALTHY) == results.endswith("---")
