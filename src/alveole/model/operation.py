"""An operation: the record of one user action, its steps, progress and outcome."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from alveole.model.base import AnyMap, Name, Record, Timestamp


class OperationState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Step(Record):
    """One recorded step and what it took."""

    name: str
    started_at: Timestamp
    duration_ms: float | None = None  # None: under way
    detail: str = ""


class Operation(Record):
    """Key ``projects/PROJECT/operations/ID``. Ids sort by time of creation."""

    kind: Literal["operation"] = "operation"
    id: str
    project: Name = "default"
    verb: str  # instance.run, instance.stop, image.pull, volume.create ...
    target: str  # kind/name
    node: str = ""  # for tasks: the node whose agent carries it out
    generation: int = 0  # for instance verbs: done when the instance has converged on it
    params: AnyMap = Field(default_factory=dict)  # for tasks: what the agent needs
    state: OperationState = OperationState.RUNNING
    created_at: Timestamp
    finished_at: Timestamp | None = None
    deadline_at: Timestamp | None = None
    steps: tuple[Step, ...] = ()
    progress: str = ""
    result: AnyMap = Field(default_factory=dict)
    error: AnyMap | None = None  # code, message, hint, field
