"""Sessions with a process: of a command run in an instance (pipes or a terminal), and attached to its first process."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress

from alveole.host.pty import Terminal
from alveole.model.error import conflict
from alveole.runtime import conmon

STDOUT, STDERR = 1, 2
_CHUNK_BYTES = 32 << 10
_CHUNKS_AHEAD = 16
_END_OF_INPUT = b"\x04"  # what a terminal's user types
_ATTACH_STREAMS = {2: STDOUT, 3: STDERR}  # first byte of conmon's packets
_ATTACH_READ_BYTES = 16 << 10  # twice what conmon reads at once
_ATTACH_WRITE_BYTES = 16 << 10  # conmon cuts packets over 32 KiB

End = Callable[[], Awaitable[None]]
ExitCode = Callable[[], Awaitable[int]]


async def _pump(sources: Mapping[int, asyncio.StreamReader]) -> AsyncIterator[tuple[int, bytes]]:
    """Chunks of several readers as they come, at most ``_CHUNKS_AHEAD`` read ahead of the consumer."""
    queue: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(_CHUNKS_AHEAD)

    async def forward(number: int, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):  # EIO: a terminal's last program closed it
            while chunk := await reader.read(_CHUNK_BYTES):
                await queue.put((number, chunk))
        await queue.put((number, b""))

    tasks = [asyncio.create_task(forward(number, reader)) for number, reader in sources.items()]
    try:
        open_sources = len(tasks)
        while open_sources:
            number, chunk = await queue.get()
            if chunk:
                yield number, chunk
            else:
                open_sources -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


class PipeStream:
    """A command run through pipes. ``end`` kills it inside the instance and forgets its files."""

    def __init__(self, engine: asyncio.subprocess.Process, end: End) -> None:
        self._engine = engine
        self._end = end

    async def write(self, data: bytes) -> None:
        writer = self._engine.stdin
        if writer is None or writer.is_closing():
            return
        with suppress(BrokenPipeError, ConnectionResetError):  # it reads no more: as in a shell's pipe
            writer.write(data)
            await writer.drain()

    async def close_stdin(self) -> None:
        if self._engine.stdin:
            self._engine.stdin.close()

    async def resize(self, rows: int, columns: int) -> None:
        """Pipes have no size."""

    def output(self) -> AsyncIterator[tuple[int, bytes]]:
        readers = {STDOUT: self._engine.stdout, STDERR: self._engine.stderr}
        return _pump({number: reader for number, reader in readers.items() if reader})

    async def wait(self) -> int:
        return _exit_code(await self._engine.wait())

    async def close(self) -> None:
        await self._end()


class TerminalStream:
    """A command run on a terminal of its own, whose master end is here."""

    def __init__(self, engine: asyncio.subprocess.Process, end: End, terminal: Terminal) -> None:
        self._engine = engine
        self._end = end
        self._terminal = terminal

    async def write(self, data: bytes) -> None:
        await self._terminal.write(data)

    async def close_stdin(self) -> None:
        await self._terminal.write(_END_OF_INPUT)

    async def resize(self, rows: int, columns: int) -> None:
        self._terminal.resize(rows, columns)

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        while chunk := await self._terminal.read():
            yield STDOUT, chunk

    async def wait(self) -> int:
        return _exit_code(await self._engine.wait())

    async def close(self) -> None:
        self._terminal.close()
        await self._end()


class AttachStream:
    """One of any number of clients of an instance's monitor. Without a terminal, the first that closes its input
    closes the instance's; a client that leaves does so too, as with other container systems."""

    def __init__(self, connection: socket.socket, place: conmon.Place, exit_code: ExitCode, *, tty: bool) -> None:
        self._connection = connection
        self._place = place
        self.exit_code = exit_code
        self._tty = tty
        self.on_resize: Callable[[int, int], Awaitable[None]] | None = None  # where a terminal beyond ours is told

    @classmethod
    async def open(cls, place: conmon.Place, exit_code: ExitCode, *, tty: bool) -> "AttachStream":
        """Raises AlveoleError(CONFLICT) if the instance has ended."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, str(place.attach_socket))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            raise conflict(f"instance {place.id} has ended", hint="start it again, or read its logs") from error
        except BaseException:
            connection.close()
            raise
        return cls(connection, place, exit_code, tty=tty)

    async def write(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        with suppress(BrokenPipeError, ConnectionResetError):  # the instance has ended
            for start in range(0, len(data), _ATTACH_WRITE_BYTES):
                await loop.sock_sendall(self._connection, data[start : start + _ATTACH_WRITE_BYTES])

    async def close_stdin(self) -> None:
        if self._tty:
            await self.write(_END_OF_INPUT)
        else:
            with suppress(OSError):  # the instance has ended
                self._connection.shutdown(socket.SHUT_WR)

    async def resize(self, rows: int, columns: int) -> None:
        if self._tty:
            conmon.resize(self._place, rows, columns)
        if self.on_resize:
            await self.on_resize(rows, columns)

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionResetError):  # it ended with input unread
            while packet := await loop.sock_recv(self._connection, _ATTACH_READ_BYTES):
                yield _ATTACH_STREAMS[packet[0]], packet[1:]

    async def wait(self) -> int:
        return await self.exit_code()

    async def close(self) -> None:
        self._connection.close()
