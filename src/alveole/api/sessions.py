"""Exec and attach over WebSocket.

The first client message is JSON; then binary frames carry standard input, and JSON frames
``{"resize": [rows, columns]}`` and ``{"close_stdin": true}``. The server sends binary frames whose first byte is
1 (stdout) or 2 (stderr), and last ``{"exit_code": N}`` or ``{"error": {...}}``.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from alveole.api.errors import error_body
from alveole.api.service import Service, project_of
from alveole.api.strict import validate
from alveole.control.query import resolve_instance, wait_operation
from alveole.control.reports import read_error
from alveole.model.agent import ExecRequest, Stream, TerminalSize
from alveole.model.base import Record
from alveole.model.error import AlveoleError, invalid
from alveole.model.instance import Instance
from alveole.model.operation import OperationState

WAIT_S = 3600.0
Begin = Callable[[Service, object, Instance], Awaitable[Stream]]


class AttachRequest(Record):
    rows: TerminalSize = 24
    columns: TerminalSize = 80


class Order(Record):
    """A text message of the client, after the first."""

    resize: tuple[TerminalSize, TerminalSize] | None = None
    close_stdin: bool = False


async def exec_session(service: Service, socket: WebSocket) -> None:
    await _serve(service, socket, _exec)


async def attach_session(service: Service, socket: WebSocket) -> None:
    await _serve(service, socket, _attach)


async def _exec(service: Service, first: object, instance: Instance) -> Stream:
    request = validate(ExecRequest, first)
    return await service.streams.exec(instance, request)


async def _attach(service: Service, first: object, instance: Instance) -> Stream:
    """Waits for an instance that is being made; the error of its operation if that fails first."""
    request = validate(AttachRequest, first)
    attaching = asyncio.ensure_future(service.streams.attach(instance))
    failing = asyncio.ensure_future(_failure(service, instance))
    try:
        await asyncio.wait({attaching, failing}, return_when=asyncio.FIRST_COMPLETED)
        if not attaching.done() and (error := failing.result()) is not None:
            raise error
        stream = await attaching
    finally:
        for task in (attaching, failing):
            task.cancel()
        await asyncio.wait({attaching, failing})
    if instance.spec.tty:
        await stream.resize(request.rows, request.columns)
    return stream


async def _failure(service: Service, instance: Instance) -> AlveoleError | None:
    """What the operation under way on the instance fails with. Never returns if it does not."""
    if instance.operation:
        operation = await wait_operation(service.context.cache, instance.project, instance.operation, WAIT_S)
        if operation.state in {OperationState.FAILED, OperationState.CANCELLED} and operation.error:
            return read_error(operation.error)
    await asyncio.Event().wait()
    return None


async def _serve(service: Service, socket: WebSocket, begin: Begin) -> None:
    await socket.accept()
    try:
        first = await _first(socket)  # before any answer: a close with words of the client unread would take long
        instance: Instance = resolve_instance(
            service.context.cache, project_of(socket), socket.path_params["ref"]
        ).record
        stream = await begin(service, first, instance)
        try:
            code = await _relay(socket, stream)
        finally:
            await stream.close()
        await socket.send_text(json.dumps({"exit_code": code}))
    except AlveoleError as error:
        with suppress(WebSocketDisconnect):
            await socket.send_text(json.dumps(error_body(error)))
    except WebSocketDisconnect:
        return
    with suppress(WebSocketDisconnect, RuntimeError):
        await socket.close()


async def _first(socket: WebSocket) -> object:
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1000))
    return _json(message.get("text"))


def _json(text: str | None) -> object:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise invalid(f"the message is not JSON: {error}") from error


async def _relay(socket: WebSocket, stream: Stream) -> int:
    """Both directions until the process ends. Raises WebSocketDisconnect when the client is gone."""
    receiving = asyncio.ensure_future(_receive(socket, stream))
    sending = asyncio.ensure_future(_send(socket, stream))
    try:
        await asyncio.wait({receiving, sending}, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            receiving.result()
        return await sending
    finally:
        for task in (receiving, sending):
            task.cancel()
        await asyncio.wait({receiving, sending})


async def _send(socket: WebSocket, stream: Stream) -> int:
    async for channel, data in stream.output():
        await socket.send_bytes(bytes([channel]) + data)
    return await stream.wait()


async def _receive(socket: WebSocket, stream: Stream) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        if message.get("bytes") is not None:
            await stream.write(message["bytes"])
        elif message.get("text") is not None:
            await _control(stream, message["text"])


async def _control(stream: Stream, text: str) -> None:
    """Resize or end of input. What is not understood is an error, as everywhere."""
    order = validate(Order, _json(text))
    if order.resize is not None:
        await stream.resize(*order.resize)
    if order.close_stdin:
        await stream.close_stdin()
