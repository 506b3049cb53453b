"""Time and randomness as parameters, so that the control plane can run in a simulation."""

from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """The time."""

    def now(self) -> datetime:
        """Wall clock time in UTC, for records."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back, for durations and deadlines."""
        ...


class Ids(Protocol):
    """Randomness that names things."""

    def hex(self, digits: int) -> str:
        """That many random hex digits."""
        ...
