"""When an operation on an instance is over. Pure."""

from typing import Literal

from alveole.model.instance import Instance, InstanceStatus, Phase
from alveole.model.operation import Operation

_STARTED = frozenset({Phase.RUNNING, Phase.EXITED, Phase.BACKOFF})
_ENDED = frozenset({Phase.EXITED, Phase.CREATED, Phase.FAILED})


def outcome(operation: Operation, instance: Instance, status: InstanceStatus) -> Literal["done", "failed", "under way"]:
    """What a reported status means for the operation. Removal is over when the agent says that nothing is left."""
    if status.observed_generation < operation.generation:
        return "under way"
    match operation.verb:
        case "instance.run" | "instance.fork" | "instance.start" | "instance.restart":
            if status.run == instance.run and status.phase is Phase.FAILED:
                return "failed"
            return "done" if status.run == instance.run and status.phase in _STARTED else "under way"
        case "instance.create":
            return "done" if status.phase in _ENDED else "under way"
        case "instance.stop":
            return "done" if status.phase in _ENDED else "under way"
        case _:
            return "under way"
