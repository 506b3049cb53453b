"""What an engine's last words mean to the user."""

import re
from collections.abc import Sequence

from alveole.model.error import AlveoleError, internal, invalid

_LENGTH = 600
_WORKDIR = re.compile(r"chdir|working directory|\bcwd\b", re.IGNORECASE)
_NOT_FOUND = re.compile(
    r"executable file .* not found|error finding executable|failed to load .*: no such file|executable path is empty"
    r"|cannot find executable|open executable.*no such file|exec.*: no such file or directory",
    re.IGNORECASE,
)
_NOT_EXECUTABLE = re.compile(
    r"open executable|exec format error|failed to load|exec\S* .*permission denied", re.IGNORECASE
)


def fault(engine: str, words: str, args: Sequence[str], workdir: str) -> AlveoleError:
    """INVALID naming what the image lacks, when that is it; else INTERNAL with the last words.

    The field says what a shell's exit code would: "command" not found is 127, "command.mode" not executable is 126.
    """
    words = words.strip()[-_LENGTH:]
    command = args[0] if args else ""
    if _WORKDIR.search(words):
        return invalid(f"working directory {workdir!r} not found in the image", hint=words, field="workdir")
    if _NOT_FOUND.search(words):
        hint = "give the path of a program that the image has; its PATH was searched"
        return invalid(f"command {command!r} not found in the image", hint=hint, field="command")
    if _NOT_EXECUTABLE.search(words):
        return invalid(f"command {command!r} of the image cannot be executed", hint=words, field="command.mode")
    return internal(f"{engine} failed: {words or 'it said nothing'}", hint="alveole doctor checks this host")
