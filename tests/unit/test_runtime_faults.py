"""What engines say, word for word, and what users are told."""

import pytest

from alveole.model.error import ErrorCode
from alveole.runtime.faults import fault


@pytest.mark.parametrize(
    ("words", "code", "field"),
    [
        ("executable file `x` not found in $PATH: No such file or directory", ErrorCode.INVALID, "command"),
        (
            'error finding executable "x" in PATH [/bin]: no such file or directory',
            ErrorCode.INVALID,
            "command",
        ),
        ("chdir `/nodir`: No such file or directory", ErrorCode.INVALID, "workdir"),
        (
            'failed to find initial working directory "/nodir": no such file or directory',
            ErrorCode.INVALID,
            "workdir",
        ),
        ("open executable: Operation not permitted", ErrorCode.INVALID, "command.mode"),
        ("failed to load /etc: permission denied", ErrorCode.INVALID, "command.mode"),
        ("exec `/x`: Exec format error", ErrorCode.INVALID, "command.mode"),
        ("make `/a/root` private: Permission denied", ErrorCode.INTERNAL, ""),
        ("open mount target `/etc/hostname`: Not a directory", ErrorCode.INTERNAL, ""),
        ("", ErrorCode.INTERNAL, ""),
    ],
)
def test_engine_words(words: str, code: ErrorCode, field: str) -> None:
    told = fault("crun", words, ("x", "y"), "/nodir")
    assert (told.code, told.field) == (code, field)
    if field == "command":
        assert "'x'" in told.message
    if code == ErrorCode.INTERNAL:
        assert words in told.message


def test_long_words_are_cut() -> None:
    assert len(fault("crun", "x" * 100_000, (), "/").message) < 1000
