"""Alveole's daemon as the benchmarks ask it: by its API's socket, and by its command line as users type it."""

import sys
from pathlib import Path
from typing import Any

from tests.integration.daemon import Daemon
from tests.perf.harness import ask, command

IMAGE = "busybox"
IDLE = ("sleep", "100000")
_PROGRAM = str(Path(sys.executable).with_name("alveole"))
_WAIT = {"Prefer": "wait=60"}


class Alveole:
    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def api(self, method: str, target: str, body: Any = None) -> Any:
        return ask(self.daemon.socket, method, f"/v1/{target}", body, _WAIT)

    def done(self, method: str, target: str, body: Any = None) -> Any:
        """The operation of a mutation, carried out."""
        operation = self.api(method, target, body)
        assert operation["state"] == "done", operation
        return operation

    def start_by_api(self, *argv: str, **spec: Any) -> Any:
        """The operation of a start, once its instance runs."""
        return self.done("POST", "instances", {"spec": {"image": IMAGE, "command": argv, **spec}})

    def remove(self, operation: Any) -> None:
        self.done("DELETE", f"instances/{operation['result']['id']}?force=true")

    def cli(self, *arguments: str) -> str:
        return command(_PROGRAM, "--socket", str(self.daemon.socket), *arguments)

    def monitors(self) -> list[int]:
        """The process that stays with each instance, outside it."""
        return [pid for pid in self.daemon.processes() if _name(pid) == "conmon"]

    def resident(self) -> list[int]:
        """The daemon and what it keeps for itself."""
        return [pid for pid in self.daemon.processes() if _name(pid).startswith("python")]


def _name(pid: int) -> str:
    try:
        return Path(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]).name
    except (FileNotFoundError, ProcessLookupError):
        return ""
