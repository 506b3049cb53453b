"""What a node's agent does next with one instance. Pure: the whole life of an instance is decided here."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from alveole.model.instance import Desired, Instance, InstanceStatus, Phase, Restart

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 60.0
GRACE_S, SYSTEM_GRACE_S = 10.0, 60.0  # if nobody says otherwise; a whole operating system has more to end
STABLE_S = 10.0
"""Having run this long, an instance's next backoff begins anew (as Docker does)."""


@dataclass(frozen=True, slots=True)
class Start:
    """Make it and start it. ``restarts``: how many automatic ones this run will have had then."""

    restarts: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End it, with this much grace before SIGKILL."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class Remove:
    """It does not run: leave nothing of it."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing to do until the assignment changes, its process ends, or ``until``; ``phase`` is what to report."""

    phase: Phase
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Sleep:
    """Put what it is on disk, and give back all it uses."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """It shall begin asleep: take what it goes on from, and start nothing."""


Action = Start | Stop | Sleep | Prepare | Remove | Rest


def decide(instance: Instance, status: InstanceStatus, *, running: bool, now: datetime) -> Action:
    """The next action. ``status`` is the agent's own latest, ``running`` whether its process is there now."""
    if running:
        return _decide_running(instance, status)
    match instance.desired:
        case Desired.REMOVED:
            return Remove()
        case Desired.ASLEEP:
            return Prepare() if status.phase is Phase.PENDING else Rest(status.phase)
        case Desired.STOPPED:
            return Rest(Phase.CREATED if status.run == 0 else Phase.EXITED)
        case Desired.RUNNING:
            return _decide_ended(instance, status, now)


def _decide_running(instance: Instance, status: InstanceStatus) -> Action:
    if instance.desired is Desired.RUNNING and status.run == instance.run:
        return Rest(Phase.RUNNING)
    if instance.desired is Desired.ASLEEP and status.run == instance.run:
        return Sleep()
    return Stop(0.0 if instance.force else _grace_s(instance))


def _grace_s(instance: Instance) -> float:
    for grace_s in (instance.stop_grace_s, instance.spec.stop_grace_s):
        if grace_s is not None:
            return grace_s
    return SYSTEM_GRACE_S if instance.is_system else GRACE_S


def _decide_ended(instance: Instance, status: InstanceStatus, now: datetime) -> Action:
    if status.run < instance.run:
        return Start(restarts=0)
    if not wants_restart(instance.spec.restart, status):
        return Rest(Phase.FAILED if status.error else Phase.EXITED)
    due = status.next_start_at or now
    return Start(restarts=status.restarts + 1) if due <= now else Rest(Phase.BACKOFF, due)


def wants_restart(restart: Restart, status: InstanceStatus) -> bool:
    """Whether the restart policy starts it again after this end."""
    match restart.policy:
        case "no":
            return False
        case "on-failure":
            failed = status.error is not None or status.exit_code != 0
            return failed and (restart.max_retries == 0 or status.restarts < restart.max_retries)
        case "always" | "unless-stopped":
            return True


def backoff(status: InstanceStatus, finished_at: datetime) -> datetime:
    """When an instance that just ended may start again: 0.1 s doubled with each restart, at most 60 s."""
    ran_s = (finished_at - status.started_at).total_seconds() if status.started_at else 0.0
    exponent = 0 if ran_s >= STABLE_S else min(status.restarts, 20)
    return finished_at + timedelta(seconds=min(BACKOFF_FIRST_S * 2**exponent, BACKOFF_MAX_S))


def is_settled(instance: Instance, status: InstanceStatus) -> bool:
    """Whether it has ended for good: nothing will start it but the user."""
    ended = status.phase in {Phase.EXITED, Phase.FAILED}
    return (
        ended
        and status.run == instance.run
        and (instance.desired is not Desired.RUNNING or not wants_restart(instance.spec.restart, status))
    )
