"""Run a program to its end and follow what it says, line by line."""

import asyncio
import os
import re
import shlex
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from alveole.host.process import environment, kill_group
from alveole.model.error import AlveoleError, ErrorCode, unsupported

LAST_LINES = 20
_LINE_CHARACTERS = 500
_CHUNK_BYTES = 1 << 16
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    code: int  # negative: killed by that signal
    last: tuple[str, ...]  # at most LAST_LINES


async def follow(
    argv: Sequence[str], *, timeout_s: float, on_line: Callable[[str], None], env: Mapping[str, str] | None = None
) -> Followed:
    """Run a program whose output is nobody's data: shortened lines without terminal controls go to ``on_line``.

    Raises AlveoleError: UNSUPPORTED if it is not installed, TIMEOUT past the deadline. However this ends, the program
    and its process group have ended.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    async with _pipe() as (output, theirs):
        process = await _start(argv, theirs, env)
        try:
            async with asyncio.timeout(timeout_s):
                async for line in _lines(output):
                    last.append(line)
                    on_line(line)
                code = await process.wait()
        except TimeoutError as error:
            raise AlveoleError(
                ErrorCode.TIMEOUT,
                f"{argv[0]} did not end within {timeout_s:g} s",
                hint=f"to replay: {shlex.join(argv)}",
            ) from error
        finally:
            if process.returncode is None:
                kill_group(process.pid)
                await process.wait()
    return Followed(code=code, last=tuple(last))


async def _start(argv: Sequence[str], output: int, env: Mapping[str, str] | None) -> asyncio.subprocess.Process:
    """Closes ``output``, which the program has then."""
    try:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env=environment(env),
            process_group=0,
        )
    except FileNotFoundError as error:
        raise unsupported(f"program {argv[0]} is not installed", hint="alveole doctor names the package") from error
    finally:
        os.close(output)


@asynccontextmanager
async def _pipe() -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """A reader, and the descriptor to write to, which the caller closes.

    Not asyncio's own pipe for a process: to wait for the process would then be to wait for whoever else holds the
    pipe, and what a killed engine leaves running does.
    """
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader),
        open(ours, "rb", buffering=0),  # noqa: PTH123, SIM115  (a descriptor)
    )
    try:
        yield reader, theirs
    finally:
        transport.close()


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines without their ends, empty ones left out; what is beyond _LINE_CHARACTERS is dropped, however long."""
    rest = b""
    while chunk := await stream.read(_CHUNK_BYTES):
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            if text := _shown(line):
                yield text
        rest = rest[: 4 * _LINE_CHARACTERS]
    if text := _shown(rest):
        yield text


def _shown(line: bytes) -> str:
    return _CONTROLS.sub("", line.decode(errors="replace"))[:_LINE_CHARACTERS].rstrip()
