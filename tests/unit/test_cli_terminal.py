"""A terminal joined to a session: a real pseudo-terminal on one side, a WebSocket server in place of the daemon."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, unix_serve

Handler = Callable[[ServerConnection], None]
EXEC = [sys.executable, "-m", "alveole", "exec"]


@contextmanager
def answering(path: Path, handler: Handler) -> Iterator[dict[str, str]]:
    """The environment of a command line that talks to this server."""
    with unix_serve(handler, str(path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield {**os.environ, "ALVEOLE_SOCKET": str(path)}
        finally:
            server.shutdown()
            thread.join()


class Terminal:
    """A command line in a terminal of 30 x 100."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(30, 100)
        self.before = termios.tcgetattr(self.ours)
        self.process = subprocess.Popen(
            [*EXEC, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  (one system call)
        )
        self.theirs = theirs
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def expect(self, text: bytes) -> None:
        give_up_at = time.monotonic() + 20
        while text not in self.seen:
            assert time.monotonic() < give_up_at, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.ours], [], [], 0.1)[0]:
                self.seen += os.read(self.ours, 4096)

    def end(self) -> int:
        code = self.process.wait(20)
        assert termios.tcgetattr(self.ours) == self.before, "the terminal was not restored"
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def test_a_terminal_is_raw_is_resized_and_is_restored(tmp_path: Path, terminals: list[Terminal]) -> None:
    first: dict[str, Any] = {}

    def handler(socket: ServerConnection) -> None:
        first.update(json.loads(socket.recv()))
        socket.send(b"\x01ready")
        while True:
            message = socket.recv()
            if message == b"q":
                socket.send(json.dumps({"exit_code": 5}))
                return
            socket.send(b"\x01<" + (message if isinstance(message, bytes) else message.encode()) + b">")

    with answering(tmp_path / "s", handler) as environment:
        terminal = Terminal(["-it", "web", "sh"], environment)
        terminals.append(terminal)
        terminal.expect(b"ready")
        terminal.type(b"a")
        terminal.expect(b"<a>")  # without a newline, and not echoed by our side
        terminal.type(b"\x03")
        terminal.expect(b"<\x03>")  # Ctrl-C is a key like any other
        terminal.resize(40, 120)
        terminal.expect(b'<{"resize": [40, 120]}>')
        terminal.type(b"q")
        assert terminal.end() == 5
    assert (first["rows"], first["columns"], first["tty"], first["stdin"]) == (30, 100, True, True)
    assert b"readya" not in terminal.seen


def test_the_terminal_is_restored_when_the_daemon_dies(tmp_path: Path, terminals: list[Terminal]) -> None:
    def handler(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(b"\x01ready")
        socket.recv()
        socket.socket.close()

    with answering(tmp_path / "s", handler) as environment:
        terminal = Terminal(["-it", "web", "sh"], environment)
        terminals.append(terminal)
        terminal.expect(b"ready")
        terminal.type(b"x")
        assert terminal.end() == 125
        terminal.expect(b"the daemon ended the session before the command had ended")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_restored_when_we_are_ended(
    tmp_path: Path, terminals: list[Terminal], number: signal.Signals
) -> None:
    closed = threading.Event()

    def handler(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(b"\x01ready")
        with pytest.raises(ConnectionClosed):
            socket.recv()
        closed.set()

    with answering(tmp_path / "s", handler) as environment:
        terminal = Terminal(["-it", "web", "sh"], environment)
        terminals.append(terminal)
        terminal.expect(b"ready")
        terminal.process.send_signal(number)
        assert terminal.end() == 128 + number
        assert closed.wait(10)


def test_ctrl_c_without_a_terminal_ends_the_command(tmp_path: Path, terminals: list[Terminal]) -> None:
    closed = threading.Event()

    def handler(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(b"\x01ready")
        with pytest.raises(ConnectionClosed):
            socket.recv()
        closed.set()

    with answering(tmp_path / "s", handler) as environment:
        terminal = Terminal(["web", "sleep", "100"], environment)
        terminals.append(terminal)
        terminal.expect(b"ready")
        terminal.type(b"\x03")
        assert terminal.end() == 130
        assert closed.wait(10)
        assert b"Traceback" not in terminal.seen


def test_pipes_carry_input_output_and_errors_apart(tmp_path: Path) -> None:
    """As `cat` in an instance: more than any buffer holds, both ways at once, and the end of input."""

    def handler(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(b"\x02to stderr")
        while isinstance(message := socket.recv(), bytes):
            socket.send(b"\x01" + message)
        socket.send(json.dumps({"exit_code": 3 if json.loads(message) == {"close_stdin": True} else 4}))

    data = os.urandom(3_000_000)
    with answering(tmp_path / "s", handler) as environment:
        done = subprocess.run(
            [*EXEC, "-i", "web", "cat"], input=data, capture_output=True, env=environment, timeout=60, check=False
        )
    assert done.returncode == 3
    assert done.stdout == data
    assert done.stderr == b"to stderr"
