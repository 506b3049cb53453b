"""How the results of a health check become health. Pure; Docker's rules."""

from dataclasses import dataclass, replace

from alveole.model.health import Health, HealthCheck


@dataclass(frozen=True, slots=True)
class HealthState:
    health: Health = Health.STARTING
    failures: int = 0  # in a row


def judge(state: HealthState, check: HealthCheck, *, passed: bool, running_s: float) -> HealthState:
    """The state after one result; failures within the start period do not count until it was healthy once."""
    if passed:
        return HealthState(Health.HEALTHY)
    if state.health is Health.STARTING and running_s < check.start_period_s:
        return state
    failures = state.failures + 1
    if failures >= check.retries:
        return HealthState(Health.UNHEALTHY, failures)
    return replace(state, failures=failures)
