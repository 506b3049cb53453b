"""Joins this terminal (or these pipes) to a session: one loop over the session, standard input and signals."""

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from alveole.client.errors import ApiError
from alveole.client.session import Ended, Output, Session

ESCAPE = b"\x1d"
"""Ctrl-], as others take it too: what leaves a console."""

_STDIN = 0
_CHUNK_BYTES = 32 << 10
_IDLE_S = 0.3


class DetachedError(Exception):
    """A signal made us leave a session that goes on without us, or the user did. ``exit_code`` is ours."""

    def __init__(self, number: int | None = None) -> None:
        """``number`` of the signal; None: the user typed ESCAPE."""
        super().__init__()
        self.exit_code = 0 if number is None else 128 + number


def size() -> tuple[int, int]:
    """Rows and columns of the terminal we write to; 24 x 80 where there is none."""
    for descriptor in (1, 0, 2):
        try:
            columns, rows = os.get_terminal_size(descriptor)
        except OSError:
            continue
        if rows and columns:
            return rows, columns
    return 24, 80


@contextmanager
def raw(active: bool) -> Iterator[None]:
    """Every key goes to the instance as it is typed. The terminal is restored however we leave."""
    if not active:
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(_STDIN)
    try:
        tty.setraw(_STDIN, termios.TCSADRAIN)  # what was typed ahead is the instance's
        yield
    finally:
        with suppress(termios.error):  # the terminal itself has gone
            termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)


class Signals:
    """Signals as bytes that a select loop can read, while entered."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)

    def __enter__(self) -> "Signals":
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._caught) for number in self._NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        os.close(self._reader)
        os.close(self._writer)

    @staticmethod
    def _caught(_number: int, _frame: FrameType | None) -> None:
        """The number is read from the pipe; a handler is only there so that the default action is not taken."""

    def fileno(self) -> int:
        return self._reader

    def take(self) -> list[int]:
        return list(os.read(self._reader, 64))


def join(
    session: Session,
    signals: Signals,
    *,
    stdin: bool,
    on_signal: Callable[[int], None],
    idle: Callable[[], None] = lambda: None,
    started: Callable[[], None] = lambda: None,
    console: bool = False,
) -> int:
    """Move bytes until the session ends; its exit code. Raises ApiError if it failed or broke.

    ``on_signal`` gets every signal but changes of the window's size, and may raise DetachedError. ``idle`` is called
    several times a second until the first output, ``started`` once when that comes. Of a ``console``, ESCAPE leaves
    it, with DetachedError, and it stays open at the end of our input.
    """
    silent = True
    while True:
        watched: list[Session | Signals | int] = [
            session,
            signals,
            *([_STDIN] if stdin and session.ready_for_input else []),
        ]
        readable, writable, _ = select.select(
            watched, [session] if session.unsent else [], [], _IDLE_S if silent else None
        )
        if signals in readable:
            _handle_signals(session, signals, on_signal)
        if writable:
            session.flush()
        if _STDIN in readable:
            stdin = _forward_stdin(session, console=console)
        for event in session.receive() if session in readable else ():
            if silent:
                silent = False
                started()
            if isinstance(event, Ended):
                return _exit_code(event)
            _write(event)
        if not readable and silent:
            idle()


def _handle_signals(session: Session, signals: Signals, on_signal: Callable[[int], None]) -> None:
    for number in signals.take():
        if number == signal.SIGWINCH:
            session.resize(*size())
        else:
            on_signal(number)


def _forward_stdin(session: Session, *, console: bool) -> bool:
    """One chunk of it; False at its end."""
    try:
        data = os.read(_STDIN, _CHUNK_BYTES)
    except OSError:  # closed, or its terminal has gone
        data = b""
    typed, escape, _ = data.partition(ESCAPE) if console else (data, b"", b"")
    if typed:
        session.send_stdin(typed)
    if escape:
        raise DetachedError
    if not data and not console:
        session.close_stdin()
    return bool(data)


def _write(output: Output) -> None:
    stream = sys.stderr if output.stream == 2 else sys.stdout
    stream.buffer.write(output.data)
    stream.buffer.flush()


def _exit_code(ended: Ended) -> int:
    if ended.exit_code is None:
        raise ApiError(
            "unavailable",
            "the daemon ended the session before the command had ended",
            "it was stopped or restarted: `alveole ls` shows what goes on",
        )
    return ended.exit_code
