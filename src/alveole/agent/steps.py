"""Recorded steps: what was done, when, and how long it took."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from alveole.model.clock import Clock
from alveole.model.operation import Step

FaultHook = Callable[[str], None]
"""Called with ``verb:step:before`` and ``verb:step:after``; fault tests end the process there."""


def no_fault(_point: str) -> None:
    return


class StepLog:
    """The steps of one action under way."""

    def __init__(self, verb: str, clock: Clock, fault: FaultHook) -> None:
        self._verb = verb
        self._clock = clock
        self._fault = fault
        self._steps: list[Step] = []

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(self._steps)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Record what is done inside. A step that fails is recorded without a duration."""
        self._fault(f"{self._verb}:{name}:before")
        began = self._clock.monotonic()
        step = Step(name=name, started_at=self._clock.now())
        self._steps.append(step)
        position = len(self._steps) - 1
        yield
        elapsed_ms = round((self._clock.monotonic() - began) * 1000, 3)
        self._steps[position] = step.replace(duration_ms=elapsed_ms)
        self._fault(f"{self._verb}:{name}:after")
