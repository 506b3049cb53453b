"""Published TCP ports on ::1: the kernel cannot send [::1] on to an IPv4 address, so a small relay does."""

import asyncio
import errno
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from alveole.model.instance import Port
from alveole.network.ports import taken
from alveole.network.rules import ANY_ADDRESS

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 16
_CONNECT_TIMEOUT_S = 10.0
_WITH_LOOPBACK = {ANY_ADDRESS, "127.0.0.1"}


class Relays:
    """Relays of all instances of a node. UDP is not relayed: clients that prefer ::1 use 127.0.0.1 for it."""

    def __init__(self) -> None:
        self._servers: dict[str, list[asyncio.Server]] = {}
        self._connections: dict[str, set[asyncio.Task[None]]] = {}

    async def open(self, instance_id: str, address: str, ports: Collection[Port]) -> None:
        """Listen on ::1 for each TCP port that is published on the host's loopback. Nothing without IPv6.

        Raises AlveoleError(EXISTS) if a program listens there; then nothing is left.
        """
        servers = self._servers.setdefault(instance_id, [])
        try:
            for port in ports:
                if port.protocol == "tcp" and port.host_address in _WITH_LOOPBACK:
                    servers.extend(await self._listen(instance_id, address, port))
        except BaseException:
            await self.close(instance_id)
            raise

    async def close(self, instance_id: str) -> None:
        """Stop listening and cut the connections of an instance. Fine if it has none."""
        for server in self._servers.pop(instance_id, []):
            server.close()
        connections = self._connections.pop(instance_id, set())
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def close_all(self) -> None:
        for instance_id in list(self._servers):
            await self.close(instance_id)

    async def _listen(self, instance_id: str, address: str, port: Port) -> list[asyncio.Server]:
        connections = self._connections.setdefault(instance_id, set())

        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(_relay(reader, writer, address, port.instance_port))
            connections.add(task)
            task.add_done_callback(connections.discard)

        try:
            return [await asyncio.start_server(serve, "::1", port.host_port)]
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise await taken(port) from error
            if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                return []
            raise


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, port: int) -> None:
    try:
        with _ended(writer):
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                inner_reader, inner_writer = await asyncio.open_connection(address, port)
            with _ended(inner_writer):
                async with asyncio.TaskGroup() as directions:
                    directions.create_task(_copy(reader, inner_writer))
                    directions.create_task(_copy(inner_reader, writer))
    except* OSError as errors:  # also TimeoutError: the client sees its connection cut, as by the instance itself
        log.debug("a connection from ::1 to %s port %d ended: %s", address, port, errors.exceptions[0])


@contextmanager
def _ended(writer: asyncio.StreamWriter) -> Iterator[None]:
    """Close a connection once what was written is sent; after a failure or cancellation at once."""
    try:
        yield
    except BaseException:
        writer.transport.abort()
        raise
    writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the end of input, which is passed on: the other direction may go on. Waits while nobody reads."""
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
