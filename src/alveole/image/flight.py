"""What operations under way hold, so that nothing they need is collected and nothing they leave half done stays."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

FRESH_S = 60.0
"""How long a finished operation's result is kept though no record names it yet."""


@dataclass(eq=False, slots=True, kw_only=True)
class Flight:
    """One operation: its temporary directory, what it relies on, and what it brought in."""

    directory: Path
    started_s: float
    held: set[str] = field(default_factory=set)
    created: set[str] = field(default_factory=set)  # undone if it fails


class Flights:
    """All operations of one store. ``clock`` gives monotonic seconds."""

    def __init__(self, fresh_s: float = FRESH_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._fresh_s = fresh_s
        self._clock = clock
        self._active: set[Flight] = set()
        self._landed: dict[str, float] = {}  # key -> when an operation that held it ended

    def begin(self, directory: Path) -> Flight:
        flight = Flight(directory=directory, started_s=self._clock())
        self._active.add(flight)
        return flight

    def hold(self, flight: Flight, keys: Iterable[str]) -> None:
        """Rely on objects that are there: whoever brought them in no longer undoes that."""
        for key in keys:
            flight.held.add(key)
            for other in self._active - {flight}:
                other.created.discard(key)

    def create(self, flight: Flight, key: str) -> None:
        """To be called just before the object appears."""
        flight.held.add(key)
        flight.created.add(key)

    def land(self, flight: Flight) -> None:
        """The operation succeeded: what it holds is some caller's from now on."""
        flight.created.clear()
        self._landed.update(dict.fromkeys(flight.held, self._clock()))

    def end(self, flight: Flight) -> None:
        self._active.discard(flight)

    def directories(self) -> set[Path]:
        return {flight.directory for flight in self._active}

    def held(self) -> set[str]:
        """Held now, or so recently that no record may name it yet; a long operation keeps what ended during it."""
        oldest_s = min([flight.started_s for flight in self._active], default=self._clock())
        self._landed = {
            key: landed_s
            for key, landed_s in self._landed.items()
            if landed_s >= oldest_s or landed_s > self._clock() - self._fresh_s
        }
        return set(self._landed).union(*(flight.held for flight in self._active))
