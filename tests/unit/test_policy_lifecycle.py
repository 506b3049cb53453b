"""The whole life of an instance is decided by ``lifecycle.decide``."""

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.model.image import DiskImage, ImageConfig, ImageContent
from alveole.model.instance import Desired, Instance, InstanceSpec, InstanceStatus, Isolation, Phase, Restart
from alveole.policy.lifecycle import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    STABLE_S,
    Action,
    Prepare,
    Remove,
    Rest,
    Sleep,
    Start,
    Stop,
    backoff,
    decide,
    is_settled,
    wants_restart,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=5)
ERROR = {"code": "internal", "message": "no"}
Policy = Literal["no", "on-failure", "always", "unless-stopped"]
POLICIES: tuple[Policy, ...] = ("no", "on-failure", "always", "unless-stopped")


DISK = ImageContent(
    digest="sha256:0", layers=(), size_bytes=1, config=ImageConfig(), disk=DiskImage(format="raw", virtual_size_bytes=1)
)
SYSTEM = InstanceSpec(image="os", isolation=Isolation.VM)


def instance(desired: Desired = Desired.RUNNING, *, policy: Policy = "no", retries: int = 0, **fields: Any) -> Instance:
    restart = Restart(policy=policy, max_retries=retries)
    spec = InstanceSpec(image="app", restart=restart, stop_grace_s=7.0)
    return Instance(id="0" * 12, name="web", created_at=NOW, desired=desired, **{"spec": spec, "run": 1, **fields})


def status(phase: Phase = Phase.EXITED, *, run: int = 1, **fields: Any) -> InstanceStatus:
    return InstanceStatus(phase=phase, run=run, **fields)


RUNS, STOPPED, REMOVED = Desired.RUNNING, Desired.STOPPED, Desired.REMOVED
TABLE: list[tuple[str, Instance, InstanceStatus, bool, Action]] = [
    ("new", instance(), status(Phase.PENDING, run=0), False, Start(0)),
    ("new, not to start", instance(STOPPED, run=0), status(Phase.PENDING, run=0), False, Rest(Phase.CREATED)),
    ("new, removed", instance(REMOVED), status(Phase.PENDING, run=0), False, Remove()),
    ("runs", instance(), status(Phase.RUNNING), True, Rest(Phase.RUNNING)),
    ("restart asked for", instance(run=2), status(Phase.RUNNING), True, Stop(7.0)),
    ("restart asked for, ended", instance(run=2), status(exit_code=0), False, Start(0)),
    ("restart resets the count", instance(run=2, policy="always"), status(restarts=9), False, Start(0)),
    ("stop", instance(STOPPED), status(Phase.RUNNING), True, Stop(7.0)),
    ("stop with its own grace", instance(STOPPED, stop_grace_s=0.5), status(Phase.RUNNING), True, Stop(0.5)),
    ("stop at once", instance(STOPPED, stop_grace_s=0.0), status(Phase.RUNNING), True, Stop(0.0)),
    ("stop, nobody said how", instance(STOPPED, spec=InstanceSpec(image="app")), status(Phase.RUNNING), True, Stop(10)),
    ("stop a system", instance(STOPPED, spec=SYSTEM, image=DISK), status(Phase.RUNNING), True, Stop(60)),
    ("remove while it runs", instance(REMOVED), status(Phase.RUNNING), True, Stop(7.0)),
    ("remove by force", instance(REMOVED, force=True), status(Phase.RUNNING), True, Stop(0.0)),
    ("removed, ended", instance(REMOVED), status(), False, Remove()),
    ("stopped, ended", instance(STOPPED), status(exit_code=0), False, Rest(Phase.EXITED)),
    ("stopped in backoff", instance(STOPPED, policy="always"), status(Phase.BACKOFF), False, Rest(Phase.EXITED)),
    ("ended well", instance(), status(exit_code=0), False, Rest(Phase.EXITED)),
    ("ended badly", instance(), status(exit_code=1), False, Rest(Phase.EXITED)),
    ("could not start", instance(), status(Phase.FAILED, error=ERROR), False, Rest(Phase.FAILED)),
    ("on-failure, well", instance(policy="on-failure"), status(exit_code=0), False, Rest(Phase.EXITED)),
    ("on-failure, badly", instance(policy="on-failure"), status(exit_code=1), False, Start(1)),
    ("on-failure, unknown", instance(policy="on-failure"), status(exit_code=None), False, Start(1)),
    (
        "on-failure, last try",
        instance(policy="on-failure", retries=3),
        status(exit_code=1, restarts=2),
        False,
        Start(3),
    ),
    (
        "on-failure, no more tries",
        instance(policy="on-failure", retries=3),
        status(exit_code=1, restarts=3),
        False,
        Rest(Phase.EXITED),
    ),
    (
        "on-failure, could not start, no more tries",
        instance(policy="on-failure", retries=1),
        status(Phase.FAILED, error=ERROR, restarts=1),
        False,
        Rest(Phase.FAILED),
    ),
    ("always, well", instance(policy="always"), status(exit_code=0, restarts=4), False, Start(5)),
    ("unless-stopped", instance(policy="unless-stopped"), status(exit_code=0), False, Start(1)),
    (
        "always, not yet",
        instance(policy="always"),
        status(exit_code=1, next_start_at=LATER),
        False,
        Rest(Phase.BACKOFF, LATER),
    ),
    ("always, due", instance(policy="always"), status(exit_code=1, next_start_at=NOW), False, Start(1)),
    ("run asked for in backoff", instance(policy="always", run=2), status(next_start_at=LATER), False, Start(0)),
]


@pytest.mark.parametrize(("case", "wanted", "seen", "running", "action"), TABLE, ids=[row[0] for row in TABLE])
def test_decide(case: str, wanted: Instance, seen: InstanceStatus, running: bool, action: Action) -> None:
    assert decide(wanted, seen, running=running, now=NOW) == action


instances = st.builds(
    instance,
    st.sampled_from(Desired),
    policy=st.sampled_from(POLICIES),
    retries=st.integers(0, 5),
    run=st.integers(0, 3),
    force=st.booleans(),
    stop_grace_s=st.none() | st.floats(0, 60),
)
statuses = st.builds(
    status,
    st.sampled_from(Phase),
    run=st.integers(0, 3),
    exit_code=st.none() | st.integers(0, 255),
    restarts=st.integers(0, 10),
    next_start_at=st.none() | st.sampled_from([NOW, LATER]),
    error=st.none() | st.just(ERROR),
)


@given(instances, statuses, st.booleans())
def test_what_the_user_ended_is_never_started(wanted: Instance, seen: InstanceStatus, running: bool) -> None:
    action = decide(wanted, seen, running=running, now=NOW)
    if wanted.desired is not Desired.RUNNING:
        assert not isinstance(action, Start)


@given(instances, statuses, st.booleans())
def test_files_are_never_removed_below_a_process(wanted: Instance, seen: InstanceStatus, running: bool) -> None:
    action = decide(wanted, seen, running=running, now=NOW)
    assert not (running and isinstance(action, Remove | Start))
    assert running or not isinstance(action, Stop)
    if isinstance(action, Remove):
        assert wanted.desired is Desired.REMOVED


@given(instances, statuses)
def test_settled_is_where_nothing_starts_it(wanted: Instance, seen: InstanceStatus) -> None:
    if is_settled(wanted, seen) and wanted.desired is not Desired.REMOVED:
        assert isinstance(decide(wanted, seen, running=False, now=LATER), Rest)


@given(instances.filter(lambda i: i.spec.restart.policy != "no"), statuses, st.integers(0, 255))
def test_every_state_comes_to_rest(wanted: Instance, seen: InstanceStatus, code: int) -> None:
    """A runtime whose process always ends with ``code`` at once: decide stops acting, or waits in backoff."""
    running, now, starts = seen.phase is Phase.RUNNING, NOW, 0
    for _ in range(50):
        action = decide(wanted, seen, running=running, now=now)
        match action:
            case Start(restarts):
                starts += 1
                seen = InstanceStatus(phase=Phase.RUNNING, run=wanted.run, restarts=restarts, started_at=now)
                seen = seen.replace(phase=Phase.EXITED, exit_code=code, next_start_at=backoff(seen, now))
            case Stop():
                running, seen = False, seen.replace(phase=Phase.EXITED, exit_code=code)
            case Sleep() | Prepare():
                running, seen = False, seen.replace(phase=Phase.ASLEEP)
            case Remove():
                return
            case Rest(Phase.RUNNING):
                running, seen = False, seen.replace(phase=Phase.EXITED, exit_code=code, next_start_at=now)
            case Rest(_, until):
                if until is None:
                    break
                assert until > now
                now = until
    retries = wanted.spec.restart.max_retries
    if wanted.spec.restart.policy == "on-failure" and retries:
        assert starts <= retries + 1
        assert isinstance(action, Rest)
        assert action.until is None
    if wanted.spec.restart.policy in {"always", "unless-stopped"} and wanted.desired is Desired.RUNNING:
        assert starts > 1


@given(st.integers(0, 10_000), st.floats(0, 100))
def test_backoff_is_bounded(restarts: int, ran_s: float) -> None:
    end = NOW + timedelta(seconds=ran_s)
    delay_s = (backoff(status(started_at=NOW, restarts=restarts), end) - end).total_seconds()
    assert BACKOFF_FIRST_S <= delay_s <= BACKOFF_MAX_S


def test_backoff_grows_until_it_ran_stably() -> None:
    end = NOW + timedelta(seconds=1)
    delays = [(backoff(status(started_at=NOW, restarts=n), end) - end).total_seconds() for n in range(12)]
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays == sorted(delays)
    assert delays[-1] == BACKOFF_MAX_S
    stable = NOW + timedelta(seconds=STABLE_S)
    assert backoff(status(started_at=NOW, restarts=11), stable) - stable == timedelta(seconds=BACKOFF_FIRST_S)


def test_what_never_started_waits_as_if_it_had_just_ended() -> None:
    assert backoff(status(restarts=2), NOW) == NOW + timedelta(seconds=0.4)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_disagree_only_as_documented(policy: Policy) -> None:
    restart = Restart(policy=policy)
    assert wants_restart(restart, status(exit_code=0)) == (policy in {"always", "unless-stopped"})
    assert wants_restart(restart, status(exit_code=1)) == (policy != "no")


def test_sleep_is_decided_for_what_runs_and_only_once() -> None:
    wanted = instance(Desired.ASLEEP)
    awake = InstanceStatus(phase=Phase.RUNNING, run=wanted.run)
    assert decide(wanted, awake, running=True, now=NOW) == Sleep()
    asleep = awake.replace(phase=Phase.ASLEEP)
    assert decide(wanted, asleep, running=False, now=NOW) == Rest(Phase.ASLEEP)
    again = wanted.replace(desired=Desired.RUNNING, run=wanted.run + 1)
    assert decide(again, asleep, running=False, now=NOW) == Start(restarts=0)
    assert isinstance(decide(again.replace(desired=Desired.ASLEEP), awake, running=True, now=NOW), Stop)
