"""What is read from the files of a captured sandbox, and from the engine's words."""

import pytest

from alveole.host.process import Result
from alveole.model.error import ErrorCode
from alveole.runtime.runsc_image import has_strangers
from alveole.runtime.runsc_words import capture_fault, is_connecting, restore_fault, words_of

BETWEEN = b"\0\0\0\1\7\0\0\0\1\6\0\0\0\6"
OWN = b"...\x0b__no_name_0" + BETWEEN + b"host:%d\0\0"
STRANGER = b"...\1\5\0\0\0\1\7" + BETWEEN + b"host:1\0\0"
ROOM = 1 << 30


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (b"", False),
        (OWN % 0 + OWN % 1 + OWN % 2, False),
        (OWN % 0 + OWN % 1 + OWN % 2 + STRANGER, True),
        (OWN % 0 + bytes((2 << 20) - 3 - len(OWN % 0) - len(STRANGER) + len(b"host:1\0\0")) + STRANGER, True),
        (OWN % 1 + b"a file named host:1, and one named host:2", False),
        (b"another way of writing: host:1", False),
    ],
)
def test_files_of_commands_are_found(state: bytes, expected: bool) -> None:
    assert has_strangers(state) is expected


@pytest.mark.parametrize(
    ("words", "room_bytes", "code", "told"),
    [
        ("checkpoint failed: statefile error: no space left on device", ROOM, ErrorCode.EXHAUSTED, "space"),
        ("runtime error: nil pointer dereference", 4096, ErrorCode.EXHAUSTED, "space"),
        ('gofer.dentry("x").beforeSave: deleted and invalidated dentries', ROOM, ErrorCode.CONFLICT, "deleted"),
        ("endpoint cannot be saved in connected state: local 1.2.3.4:5", ROOM, ErrorCode.CONFLICT, "connections"),
        ("nil pointer:\ngoroutine 1\nresetConnectionLocked(", ROOM, ErrorCode.CONFLICT, "connection"),
        ("nil pointer:\ngoroutine 1\nsomething", ROOM, ErrorCode.INTERNAL, "cannot be captured: nil pointer"),
    ],
)
def test_what_the_words_mean(words: str, room_bytes: int, code: ErrorCode, told: str) -> None:
    error = capture_fault("abc", words, room_bytes=room_bytes)
    assert error.code is code
    assert told in error.message
    assert "goroutine" not in str(error)


def test_only_a_connection_being_made_is_waited_for() -> None:
    assert is_connecting("nil pointer ... resetConnectionLocked")
    assert not is_connecting("nil pointer ... something else")


def test_a_failed_restore_keeps_its_reason() -> None:
    result = Result(
        argv=("runsc",), code=128, stdout=b"", stderr=b"starting container: EOF:\ngoroutine 66 [running]:\n"
    )
    assert restore_fault("abc", words_of(result)).message.endswith("starting container: EOF")
