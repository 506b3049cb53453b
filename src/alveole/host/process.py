"""The one way to run a program: argv only, explicit environment, a deadline, bounded output, a replayable error."""

import asyncio
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alveole.model.error import AlveoleError, ErrorCode, internal, unsupported

OUTPUT_LIMIT_BYTES = 4 << 20
_TAIL_CHARACTERS = 600
BASE_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    argv: tuple[str, ...]
    code: int  # negative: killed by that signal
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")

    def failure(self) -> AlveoleError:
        """What to raise: the program's last words and a line to replay it by hand."""
        words = (self.stderr or self.stdout).decode(errors="replace").strip()[-_TAIL_CHARACTERS:]
        how = f"exit code {self.code}" if self.code >= 0 else f"killed by {signal.Signals(-self.code).name}"
        return internal(f"{self.argv[0]} failed: {words or how}", hint=f"{how}; to replay: {shlex.join(self.argv)}")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment programs get: a fixed base, the host's proxy settings, and what the caller adds."""
    proxies = {k: v for k, v in os.environ.items() if k.lower() in {"http_proxy", "https_proxy", "no_proxy"}}
    return {**BASE_ENVIRONMENT, **proxies, **(extra or {})}


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
) -> Result:
    """Run a program to its end.

    Raises AlveoleError: UNSUPPORTED if it is not installed, TIMEOUT past the deadline (it is killed with its group),
    INTERNAL with its last words if ``check`` and it failed. Killed with its group when the caller is cancelled.
    """
    argv = tuple(argv)
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(env),
            pass_fds=pass_fds,
            cwd=cwd,
            process_group=0,
            limit=OUTPUT_LIMIT_BYTES,
        )
    except FileNotFoundError as error:
        raise unsupported(f"program {argv[0]} is not installed", hint="alveole doctor names the package") from error
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate(stdin)
    except TimeoutError as error:
        raise AlveoleError(
            ErrorCode.TIMEOUT, f"{argv[0]} did not end within {timeout_s:g} s", hint=f"to replay: {shlex.join(argv)}"
        ) from error
    finally:
        if process.returncode is None:
            kill_group(process.pid)
            await process.wait()
    result = Result(argv=argv, code=process.returncode or 0, stdout=stdout, stderr=stderr)
    if check and result.code != 0:
        raise result.failure()
    return result


def kill_group(pid: int) -> None:
    """SIGKILL a process group that ``run`` or a caller of ``process_group=0`` made; fine if it is gone."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
