"""When a schedule takes its next snapshot, and which of its old ones it lets go. Pure."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from alveole.model.instance import Schedule
from alveole.model.snapshot import Snapshot

RETRY_S = 60.0
"""How soon one that failed is tried again, if the next is not due sooner."""


def is_due(schedule: Schedule, taken: Sequence[Snapshot], tried_at: datetime | None, now: datetime) -> bool:
    """Whether to take one now. ``taken``: those of this schedule; ``tried_at``: when one was asked for last."""
    every = timedelta(seconds=schedule.every_s)
    if any(now - snapshot.created_at < every for snapshot in taken):
        return False
    return tried_at is None or now - tried_at >= min(every, timedelta(seconds=RETRY_S))


def surplus(schedule: Schedule, taken: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    """The oldest, beyond those that are kept; none that is being made or removed."""
    ready = sorted((s for s in taken if s.phase == "ready" and not s.operation), key=lambda s: s.created_at)
    return tuple(ready[: max(0, len(ready) - schedule.keep)])
