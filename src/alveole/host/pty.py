"""Terminals: the socket on which an OCI engine hands over a pty's master, and its size."""

import array
import asyncio
import errno
import fcntl
import os
import socket
import struct
import termios
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from alveole.host.ready import wait_readable, wait_writable
from alveole.model.error import internal

_READ_BYTES = 32 << 10
_TERMINAL_LIMIT = 16  # descriptors an engine might send; the first is the master


class ConsoleSocket:
    """A Unix socket at ``path``, there while it is entered, that receives one pty master."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> Self:
        self._listener.setblocking(False)
        self._listener.bind(str(self._path))
        self._listener.listen(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self._path.unlink(missing_ok=True)

    async def receive(self) -> int:
        """The master's descriptor, now the caller's. Waits for the engine to send it."""
        connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        with connection:
            await wait_readable(connection.fileno())
            space = socket.CMSG_LEN(_TERMINAL_LIMIT * array.array("i").itemsize)
            _, ancillary, _, _ = connection.recvmsg(4096, space, socket.MSG_CMSG_CLOEXEC)
        received = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
        if not received:
            raise internal("the engine sent no terminal")
        for extra in received[1:]:
            os.close(extra)
        return received[0]


def open_pair() -> tuple["Terminal", int]:
    """A new terminal and the descriptor of its programs' end."""
    master, slave = os.openpty()
    return Terminal(master), slave


class Terminal:
    """A pty's master, without blocking. One reader and one writer at a time."""

    def __init__(self, master: int) -> None:
        """Takes over the descriptor."""
        os.set_blocking(master, False)
        self._master = master
        self._closed = False

    async def read(self) -> bytes:
        """The next output; empty when no program has the terminal open any more."""
        while not self._closed:
            await wait_readable(self._master)
            with suppress(BlockingIOError):
                try:
                    return os.read(self._master, _READ_BYTES)
                except OSError as error:
                    if error.errno == errno.EIO:
                        return b""
                    raise
        return b""

    async def write(self, data: bytes) -> None:
        """Type ``data``; waits while programs do not read. Dropped when none has the terminal open any more."""
        while data and not self._closed:
            try:
                data = data[os.write(self._master, data) :]
            except BlockingIOError:
                await wait_writable(self._master)
            except OSError as error:
                if error.errno == errno.EIO:
                    return
                raise

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal's programs its size (SIGWINCH)."""
        if not self._closed:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        """Its programs get SIGHUP."""
        if not self._closed:
            self._closed = True
            os.close(self._master)
