"""Waiting for an operation, with a line on the terminal that says how far it is once it takes over a second."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from alveole.cli import output
from alveole.client.api import Client
from alveole.client.errors import ApiError

_TERMINAL_WAIT_S = 1.0
_PIPE_WAIT_S = 30.0
_CLEAR = "\r\x1b[K"


class ProgressLine:
    """A line that is overwritten and leaves nothing behind; silent where standard error is no terminal."""

    def __init__(self) -> None:
        self.enabled = sys.stderr.isatty()
        self._began = time.monotonic()
        self._shown = False

    @property
    def due(self) -> bool:
        return self.enabled and time.monotonic() - self._began >= _TERMINAL_WAIT_S

    def show(self, operation: Mapping[str, Any]) -> None:
        if self.due:
            import shutil

            text = output.printable(f"{describe(operation)} {output.span(time.monotonic() - self._began)}")
            sys.stderr.write(_CLEAR + text[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()
            self._shown = False

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self.clear()


def describe(operation: Mapping[str, Any]) -> str:
    """What it is doing now."""
    doing = f"{operation['verb']} {operation['target'].partition('/')[2]}"
    under_way = [step["name"] for step in operation.get("steps", ()) if "duration_ms" not in step]
    parts = [*under_way[-1:], operation.get("progress") or ""]
    return ": ".join([doing, *filter(None, parts)])


def finish(client: Client, submit: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
    """Submit, wait, and return the finished operation. Raises ApiError if it failed.

    ``submit`` is given how many seconds the daemon may wait before it answers.
    """
    with ProgressLine() as progress:
        wait_s = _TERMINAL_WAIT_S if progress.enabled else _PIPE_WAIT_S
        operation = submit(wait_s)
        try:
            while operation["state"] == "running":
                progress.show(operation)
                operation = client.wait_operation(operation["id"], timeout_s=wait_s)
        except KeyboardInterrupt:
            progress.clear()
            identity = operation["id"]
            output.note(f"operation {identity} goes on; `alveole operation cancel {identity}` ends it")
            raise
    return checked(operation)


def checked(operation: dict[str, Any]) -> dict[str, Any]:
    """A finished operation that did what it should. Raises ApiError otherwise."""
    if operation["state"] == "done":
        return operation
    error = operation.get("error")
    if error:
        raise ApiError.from_record(error)
    raise ApiError(operation["state"], f"{operation['verb']} of {operation['target']} was {operation['state']}")
