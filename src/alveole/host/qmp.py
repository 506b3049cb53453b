"""QEMU's machine protocol, one connection for one piece of work: nothing depends on a connection that lasts.

The other end is hostile. The socket lies in a directory that only its QEMU can write: it is opened without following
links, and only if it is a socket.
"""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from alveole.model.error import AlveoleError, ErrorCode, internal

_CONNECT_TIMEOUT_S = 20.0
_COMMAND_TIMEOUT_S = 60.0
_POLL_S = 0.005


class Monitor:
    def __init__(self, client: QMPClient, name: str) -> None:
        self._client = client
        self._name = name

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Raises AlveoleError: INTERNAL with what QEMU says is wrong, TIMEOUT."""
        try:
            async with asyncio.timeout(_COMMAND_TIMEOUT_S):
                return await self._client.execute(command, dict(arguments or {}))
        except ExecuteError as error:
            raise internal(f"machine {self._name}: {command} failed: {error}") from error
        except TimeoutError as error:
            raise AlveoleError(ErrorCode.TIMEOUT, f"machine {self._name}: no answer to {command}") from error
        except QMPError as error:
            raise internal(f"machine {self._name}: it ended during {command}") from error

    def send_descriptor(self, descriptor: int) -> None:
        """With the command that follows: ``getfd`` or ``add-fd``."""
        self._client.send_fd_scm(descriptor)


@asynccontextmanager
async def connected(path: Path, name: str, *, alive: Callable[[], bool] = lambda: True) -> AsyncIterator[Monitor]:
    """``name`` is told in errors. Waits for a QEMU that is just starting, as long as it is ``alive``.

    Raises AlveoleError: INTERNAL if it is not there, TIMEOUT if it does not answer. A connection at a time: a second
    waits until the first is closed.
    """
    client = QMPClient(name)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await client.connect(await _connect(path, alive))
    except TimeoutError as error:
        raise AlveoleError(ErrorCode.TIMEOUT, f"machine {name}: QEMU does not answer") from error
    except (OSError, QMPError) as error:
        raise internal(f"machine {name}: QEMU cannot be reached: {error}") from error
    try:
        yield Monitor(client, name)
    finally:
        with suppress(EOFError, OSError, QMPError):  # it has ended: whoever used it was told
            await client.disconnect()


async def _connect(path: Path, alive: Callable[[], bool]) -> socket.socket:
    while True:
        try:
            return _connect_once(path)
        except (FileNotFoundError, ConnectionRefusedError):  # its QEMU makes the socket before it listens
            if not alive():
                raise
            await asyncio.sleep(_POLL_S)


def _connect_once(path: Path) -> socket.socket:
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no socket")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(f"/proc/self/fd/{descriptor}")
        except BaseException:
            connection.close()
            raise
        connection.setblocking(False)
        return connection
    finally:
        os.close(descriptor)
