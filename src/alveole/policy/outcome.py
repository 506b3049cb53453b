"""When an operation on an instance is over. Pure."""

from typing import Literal

from alveole.model.instance import Desired, Instance, InstanceStatus, Phase
from alveole.model.operation import Operation

_STARTED = frozenset({Phase.RUNNING, Phase.EXITED, Phase.BACKOFF})
_ENDED = frozenset({Phase.EXITED, Phase.CREATED, Phase.FAILED})


def outcome(operation: Operation, instance: Instance, status: InstanceStatus) -> Literal["done", "failed", "under way"]:
    """What a reported status means for the operation. Removal is over when the agent says that nothing is left."""
    if status.observed_generation < operation.generation:
        return "under way"
    match operation.verb:
        case "instance.fork" if instance.desired is Desired.ASLEEP:
            done, failed = status.phase is Phase.ASLEEP, status.phase is Phase.FAILED
        case (
            "instance.run"
            | "instance.fork"
            | "instance.start"
            | "instance.restart"
            | "instance.recreate"
            | "instance.restore"
        ):
            failed = status.run == instance.run and status.phase is Phase.FAILED
            done = status.run == instance.run and status.phase in _STARTED
        case "instance.sleep":
            done = status.phase is Phase.ASLEEP
            failed = not done and (status.error is not None or status.phase in _ENDED)
        case "instance.attach" | "instance.detach":
            failed = status.error is not None
            done = not failed
        case "instance.create" | "instance.stop":
            done, failed = status.phase in _ENDED, False
        case _:
            done, failed = False, False
    return "failed" if failed else "done" if done else "under way"
