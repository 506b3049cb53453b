"""conmon: the small process that stays with each instance, so that the daemon need not.

It keeps the instance's terminal or pipes, writes its log, serves attach connections, and leaves the exit code in a
file. It is in a session of its own and outlives the daemon.
"""

import asyncio
import json
import os
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from alveole.host import pidfd, process
from alveole.host.blocking import in_thread
from alveole.host.ready import wait_readable
from alveole.model.error import AlveoleError, ErrorCode, internal, invalid

PROGRAM = "conmon"
_CREATE_TIMEOUT_S = 60.0
_REPLY_LIMIT_BYTES = 64 << 10
_REOPEN_TIMEOUT_S = 2.0
_COLLECT_TIMEOUT_S = 1.0
_POLL_S = 0.002


class EngineFailed(Exception):  # noqa: N818  (says what happened; turned into an AlveoleError by who knows the cell)
    """The engine did not create the instance; its last words."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where conmon and the engine keep what belongs to one instance."""

    id: str
    directory: Path
    run_directory: Path

    @property
    def bundle(self) -> Path:
        return self.run_directory / "bundle"

    @property
    def engine_root(self) -> Path:
        return self.bundle / "engine"

    @property
    def attach_socket(self) -> Path:
        return self.bundle / "attach"

    @property
    def monitor_pid_file(self) -> Path:
        return self.bundle / "monitor.pid"

    @property
    def pid_file(self) -> Path:
        return self.bundle / "pid"

    @property
    def exit_file(self) -> Path:
        return self.directory / "exit"

    @property
    def oom_file(self) -> Path:
        return self.directory / "oom"

    @property
    def handle_file(self) -> Path:
        return self.directory / "handle.json"


async def create(place: Place, engine: Sequence[str], log_path: Path, *, tty: bool, stdin: bool) -> int:
    """Start a monitor that creates the instance of the bundle. Returns the pid of its first process.

    Raises EngineFailed with the engine's words, or AlveoleError(TIMEOUT).
    """
    if ":" in str(log_path):
        raise invalid(f"the log path {log_path} has a colon, which conmon cannot take", hint="move the state directory")
    argv = _argv(place, engine, log_path, tty=tty, stdin=stdin)
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            # TMPDIR: where it makes the socket for the terminal; removed with the bundle, whatever happens.
            env = {"_OCI_SYNCPIPE": str(write_end), "TMPDIR": str(place.bundle)}
            await process.run(argv, timeout_s=_CREATE_TIMEOUT_S, env=env, pass_fds=(write_end,), cwd=str(place.bundle))
        finally:
            os.close(write_end)
        return _pid(await _first_line(read_end))
    finally:
        os.close(read_end)


def _argv(place: Place, engine: Sequence[str], log_path: Path, *, tty: bool, stdin: bool) -> tuple[str, ...]:
    program, *options = engine
    return (
        *(PROGRAM, "--api-version", "--cid", place.id, "--cuuid", place.id, "--name", place.id),
        *("--runtime", program, "--bundle", str(place.bundle), "--full-attach"),
        *("--container-pidfile", str(place.pid_file), "--conmon-pidfile", str(place.monitor_pid_file)),
        *("--persist-dir", str(place.directory), "--log-path", f"k8s-file:{log_path}", "--log-level", "error"),
        "--no-sync-log",  # else the exit waits for the disk
        *(["--terminal"] if tty else ["--stdin"] if stdin else []),
        *(word for option in options for word in ("--runtime-arg", option)),
    )


async def _first_line(descriptor: int) -> bytes:
    line = b""
    try:
        async with asyncio.timeout(_CREATE_TIMEOUT_S):
            while not line.endswith(b"\n") and len(line) < _REPLY_LIMIT_BYTES:
                await wait_readable(descriptor)
                if not (chunk := os.read(descriptor, _REPLY_LIMIT_BYTES)):
                    break
                line += chunk
    except TimeoutError as error:
        raise AlveoleError(
            ErrorCode.TIMEOUT, "the engine did not create the instance in time", hint="is the host overloaded?"
        ) from error
    return line


def _pid(line: bytes) -> int:
    """conmon does not escape every control character that engines may print: a reply that is no JSON is words too."""
    try:
        reply = json.loads(line)
        pid, words = int(reply["data"]), str(reply.get("message", ""))
    except (ValueError, KeyError, TypeError):
        pid, words = -1, line.decode(errors="replace")
    if pid <= 0:
        raise EngineFailed(words.strip())
    return pid


def makers(place: Place) -> tuple[tuple[int, int], ...]:
    """(pid, start time) of the live monitor; while the instance is half made, of all that were making it.

    Those are known by the bundle in their arguments: a monitor killed early wrote no pid file, and an engine killed
    with its monitor takes a moment to die.
    """
    if place.handle_file.exists():
        return pidfd.with_arguments(str(place.bundle), among=(int(place.monitor_pid_file.read_text()),))
    return pidfd.with_arguments(str(place.bundle))


async def end(place: Place) -> None:
    """End the monitor, or whatever was making a half-made instance.

    One whose instance has ended is given a moment to collect it, so that no zombie stays on hosts whose init is slow.
    """
    if place.handle_file.exists():
        with suppress(TimeoutError):
            async with asyncio.timeout(_COLLECT_TIMEOUT_S):
                for pid, started in makers(place):
                    await pidfd.wait_ended(pid, started)
    while found := await in_thread(lambda: makers(place)):
        for pid, started in found:
            pidfd.send(pid, started, signal.SIGKILL)
        for pid, started in found:
            await pidfd.wait_ended(pid, started)


def monitor(place: Place) -> tuple[int, int]:
    """(pid, start time) of the monitor just made; (0, 0) if it has ended already."""
    pid = int(place.monitor_pid_file.read_text())
    started = pidfd.started_at(pid)
    return (0, 0) if started is None else (pid, started)


def exit_code(place: Place) -> int | None:
    """What the monitor wrote when the first process ended: its code, or 128 + N for signal N. None: nothing yet."""
    try:
        text = place.exit_file.read_text()
    except FileNotFoundError:
        return None
    return int(text) if re.fullmatch(r"\d+", text) else None


def resize(place: Place, rows: int, columns: int) -> None:
    _control(place, f"1 {rows} {columns}\n")


async def reopen_log(place: Place, log_path: Path) -> None:
    """Let it go on in a new file at ``log_path``; returns when that exists, or at once if the monitor has ended."""
    if not _control(place, "2 0 0\n"):
        return
    try:
        async with asyncio.timeout(_REOPEN_TIMEOUT_S):
            while not log_path.exists():  # noqa: ASYNC110  (another process makes it)
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise internal(f"the monitor of instance {place.id} did not reopen its log {log_path}") from error


def _control(place: Place, line: str) -> bool:
    """Whether there was a monitor to tell."""
    try:
        descriptor = os.open(place.bundle / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no monitor: no fifo (ENOENT) or no reader (ENXIO)
        return False
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
    return True
