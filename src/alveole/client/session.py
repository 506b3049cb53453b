"""An exec or attach session: a WebSocket without threads, made for a loop that also watches a terminal.

Reading and writing never wait for each other. An instance that stops reading its input while it fills its output
would otherwise stop a client that writes before it reads, and that client would stop the instance.
"""

import json
import select
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from alveole.client.errors import ApiError
from alveole.client.transport import connect

_CHUNK_BYTES = 64 << 10
_UNSENT_LIMIT_BYTES = 256 << 10
_HANDSHAKE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes the process wrote to ``stream``: 1 is standard output, 2 standard error."""

    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over. ``exit_code`` is 128 + N when signal N killed the process; None: the connection broke."""

    exit_code: int | None


class Session:
    """Call ``receive`` when the socket is readable, ``flush`` when it is writable and ``unsent`` is true."""

    def __init__(self, socket_path: str, target: str, first: Mapping[str, Any]) -> None:
        self._socket = connect(socket_path, _HANDSHAKE_TIMEOUT_S)
        self._protocol = ClientProtocol(parse_uri(f"ws://localhost{target}"), max_size=16 << 20)
        self._unsent = bytearray()
        self._message = bytearray()
        self._text = False
        try:
            self._shake_hands()
            self._socket.setblocking(False)
            self._send_json(first)
        except BaseException:
            self._socket.close()
            raise

    def _shake_hands(self) -> None:
        self._protocol.send_request(self._protocol.connect())
        try:
            self._socket.sendall(b"".join(self._protocol.data_to_send()))
            while self._protocol.state is State.CONNECTING and self._protocol.handshake_exc is None:
                self._take(self._socket.recv(_CHUNK_BYTES))
        except OSError as error:
            raise ApiError("unavailable", f"the daemon did not open the session: {error}") from error
        refused = self._protocol.handshake_exc
        if refused is not None:
            raise _refusal(refused) from refused

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def ready_for_input(self) -> bool:
        """False while the other end does not read: take no more from standard input."""
        return len(self._unsent) < _UNSENT_LIMIT_BYTES

    def send_stdin(self, data: bytes) -> None:
        if self._protocol.state is State.OPEN:
            self._protocol.send_binary(data)
            self.flush()

    def close_stdin(self) -> None:
        self._send_json({"close_stdin": True})

    def resize(self, rows: int, columns: int) -> None:
        self._send_json({"resize": [rows, columns]})

    def _send_json(self, message: Mapping[str, Any]) -> None:
        if self._protocol.state is State.OPEN:
            self._protocol.send_text(json.dumps(message).encode())
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes now. A broken connection shows when it is read."""
        self._unsent += b"".join(self._protocol.data_to_send())
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
                return
            del self._unsent[:sent]

    def receive(self) -> list[Output | Ended]:
        """What has come, possibly nothing. Raises ApiError if the server says the session failed."""
        try:
            self._take(self._socket.recv(_CHUNK_BYTES))
        except BlockingIOError:
            return []
        except OSError:
            return [Ended(None)]
        events: list[Output | Ended] = []
        for frame in self._protocol.events_received():
            if isinstance(frame, Frame):
                events.extend(self._handle(frame))
        self.flush()
        if self._protocol.state is State.CLOSED:
            events.append(Ended(None))
        return events

    def _take(self, data: bytes) -> None:
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()

    def _handle(self, frame: Frame) -> list[Output | Ended]:
        if frame.opcode not in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            return []  # pings are answered by the protocol
        if frame.opcode is not Opcode.CONT:
            self._message.clear()
            self._text = frame.opcode is Opcode.TEXT
        self._message += frame.data
        if not frame.fin:
            return []
        if not self._text:
            return [Output(self._message[0], bytes(self._message[1:]))] if self._message else []
        said = json.loads(self._message)
        if "error" in said:
            raise ApiError.from_record(said["error"])
        return [Ended(said["exit_code"])] if "exit_code" in said else []

    def wait_readable(self, timeout_s: float | None) -> bool:
        """For a caller without a loop of its own."""
        return bool(select.select([self], [], [], timeout_s)[0])

    def close(self) -> None:
        """Give the session up: an exec's process is killed, an attached instance goes on."""
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(1000)
            self.flush()
        self._socket.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refusal(refused: Exception) -> ApiError:
    """Why the server did not open the session: its own error, where it sent one."""
    unexplained = ApiError("unavailable", f"the daemon did not open the session: {refused}", "see `alveole version`")
    if not isinstance(refused, InvalidStatus) or not refused.response.body:
        return unexplained
    try:
        return ApiError.from_record(json.loads(refused.response.body)["error"])
    except (ValueError, KeyError, TypeError):
        return unexplained
