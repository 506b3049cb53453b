"""What runsc's last words mean when it saves or restores a sandbox."""

from alveole.host.process import Result
from alveole.model.error import AlveoleError, conflict, exhausted, internal

_FULL_BYTES = 1 << 20  # less room than that on a disk is none
_LENGTH = 400


def words_of(result: Result) -> str:
    """Without the stacks that Go prints after them."""
    return result.stderr.decode(errors="replace")


def said(words: str) -> str:
    """The part of them that a user can read: without the stacks that Go prints."""
    return words.partition(":\ngoroutine")[0].strip()[-_LENGTH:]


def is_connecting(words: str) -> bool:
    """Whether a connection was just being made. Its kernel takes it for one that stands, and looks for what is not."""
    return "nil pointer" in words and "resetConnectionLocked" in words


def capture_fault(instance_id: str, words: str, *, room_bytes: int) -> AlveoleError:
    """``room_bytes``: that the disk has left. When it is full, the words may say something else."""
    if "no space left" in words or room_bytes < _FULL_BYTES:
        return exhausted("no space for the memory of the sandbox", hint="free some disk space")
    if "deleted and invalidated" in words:
        return conflict(
            f"a program in instance {instance_id} has a file open that was deleted, so it cannot be captured",
            hint="let the program close it",
        )
    if "in connected state" in words:
        return conflict(
            f"instance {instance_id} has connections, and was started by a version that cannot capture it then",
            hint="stop and start it",
        )
    if is_connecting(words):
        return conflict(
            f"a program in instance {instance_id} waits for a connection, so it cannot be captured",
            hint="try again when it is connected or has given up",
        )
    return internal(f"instance {instance_id} cannot be captured: {said(words)}")


def restore_fault(instance_id: str, words: str) -> AlveoleError:
    return internal(f"instance {instance_id} cannot go on from what was captured: {said(words)}")
