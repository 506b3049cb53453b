"""Talking with the guest of a machine that runs an OCI image, by two ports that need nobody at the host's end.

What goes in passes through a FIFO that QEMU holds open, a line a request, some followed by bytes:

    seed BYTES SECONDS      what the instance is to be (see seed.py), once; the time, in seconds since the epoch
    renew BYTES SECONDS     the same for one that goes on from what another instance was
    signal NUMBER           to the instance's first process
    resize ROWS COLUMNS     its terminal
    command NAME BYTES      the process of a command about to be run over the control connection
    kill NAME               SIGKILL to that command
    mount TOKEN NAME ro|rw TARGET    a disk that was just plugged in, where the instance sees it: TARGET is base64
    unmount TOKEN NAME
    flush TOKEN             what was written to files reaches the disks

What comes out is appended to a file, a line each; what it says still stands after the daemon was restarted:

    waiting                 booted, waits for its seed
    started | failed WORDS  its first process runs, or does not: WORDS are base64
    exited CODE REASON      REASON is exited or oom
    done TOKEN | refused TOKEN WORDS

A second such file gets the NAME of each command once it runs. Of that only the end is kept.

The guest is hostile: the files are bounded by the file system they are on, and every line is checked.
"""

import asyncio
import base64
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from alveole.host.blocking import in_thread
from alveole.host.syscalls import punch_hole
from alveole.model.error import AlveoleError, ErrorCode, internal
from alveole.runtime.qemu.argv import COMMANDS, CONTROL, STATUS

_WRITE_TIMEOUT_S = 20.0
_POLL_FIRST_S, _POLL_LAST_S = 0.002, 0.02
_LIMIT_BYTES = 1 << 20
_COMMANDS_KEPT_BYTES = 16 << 10
_WORDS_LIMIT = 4096


@dataclass(frozen=True, slots=True)
class Told:
    """What the guest has said so far."""

    lines: tuple[str, ...]

    @property
    def is_waiting(self) -> bool:
        return "waiting" in self.lines

    @property
    def has_started(self) -> bool:
        return "started" in self.lines

    @property
    def failure(self) -> str | None:
        """Why it could not run the instance."""
        for line in self.lines:
            if line.startswith("failed"):
                return _decoded(line.removeprefix("failed").strip())
        return None

    def answer(self, token: str) -> str | None:
        """To a request with a token: empty if it was done, else why not. None: nothing yet."""
        for line in self.lines:
            if line == f"done {token}":
                return ""
            if line.startswith(f"refused {token} "):
                return "; ".join(_decoded(line.rpartition(" ")[2]).split("\n")).strip("; ") or "it does not say why"
        return None

    @property
    def exit(self) -> tuple[int, bool] | None:
        """Exit code of the instance's first process, and whether the guest had run out of memory."""
        for line in self.lines:
            if match := re.fullmatch(r"exited (\d{1,3}) (exited|oom)", line):
                return int(match[1]) & 0xFF, match[2] == "oom"
        return None


def _decoded(words: str) -> str:
    try:
        return base64.b64decode(words[:_WORDS_LIMIT], validate=True).decode(errors="replace")
    except ValueError:  # of base64, or of a character that no base64 has
        return "the guest did not say why"


class Guest:
    def __init__(self, directory: Path) -> None:
        """``directory`` holds the FIFO and the file; nobody but root makes entries in it."""
        self._control = directory / f"{CONTROL}.in"
        self._status = directory / STATUS
        self._commands = directory / COMMANDS

    def told(self) -> Told:
        return Told(_lines(self._status, 0))

    def has_command_started(self, name: str) -> bool:
        return name in _lines(self._commands, -_COMMANDS_KEPT_BYTES)

    def forget_commands(self) -> None:
        """Give back the memory of all but the end of the file. What is being appended meanwhile is not lost."""
        with suppress(FileNotFoundError):
            punch_hole(self._commands, keep_bytes=_COMMANDS_KEPT_BYTES)

    async def send(self, line: str, content: bytes = b"") -> None:
        """Nothing happens if the machine is gone. Raises TIMEOUT if its guest takes nothing."""
        await in_thread(lambda: _write(self._control, f"{line}\n".encode() + content))

    async def until(self, happened: Callable[[Told], bool], *, alive: Callable[[], bool], timeout_s: float) -> Told:
        """Wait until the guest has told it. Raises TIMEOUT, or INTERNAL if the machine ends before."""
        pause_s = _POLL_FIRST_S
        try:
            async with asyncio.timeout(timeout_s):
                while not happened(told := self.told()):
                    if not alive() and not happened(told := self.told()):
                        raise internal("the machine ended before its guest was ready")
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _POLL_LAST_S)
                return told
        except TimeoutError as error:
            raise AlveoleError(
                ErrorCode.TIMEOUT,
                f"the guest of the machine was not ready within {timeout_s:g} s",
                hint="is the host overloaded?",
            ) from error


def _lines(path: Path, start: int) -> tuple[str, ...]:
    """Whole lines, from ``start`` or so many bytes before the end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return ()
    try:
        if start < 0:
            start = max(0, os.fstat(descriptor).st_size + start)
        text = os.pread(descriptor, _LIMIT_BYTES, start).decode(errors="replace")
    finally:
        os.close(descriptor)
    return tuple(text.replace("\r", "").split("\n")[:-1])  # the last line may not be whole yet


def _write(fifo: Path, data: bytes) -> None:
    try:
        descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.ENOENT}:  # no reader, or nothing there: the machine has ended
            return
        raise
    deadline = time.monotonic() + _WRITE_TIMEOUT_S
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # one request after the other, also where the pipe takes a part at once
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BrokenPipeError:
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise AlveoleError(ErrorCode.TIMEOUT, "the guest of the machine takes no requests") from error
                time.sleep(_POLL_FIRST_S)
    finally:
        os.close(descriptor)
