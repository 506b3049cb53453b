"""Moments of a capture and of a load, held fast: a process is stopped, and nothing goes on until it is let."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.fault.host import KEPT, SETTLE_S, Victim, get, send
from tests.integration.daemon import until

SERVES = f"mkdir -p /d; printf {KEPT} > /d/{KEPT}; exec busybox httpd -f -p 80 -h /d"
LONG_S = 60.0  # a template is made meanwhile
_CATCH_S = 30.0
_READING = "0 0x0 "  # of /proc/PID/syscall: read(0, ...


def serving(victim: Victim, name: str, *options: str) -> dict[str, Any]:
    """A machine that serves a file."""
    small = ("--isolation", "vm", "--memory", "128m")
    victim.ok("run", "-d", "--name", name, *small, *options, "busybox", "sh", "-c", SERVES, timeout=LONG_S)
    record = victim.instance(name)
    await_serving(record)
    return record


def await_serving(record: dict[str, Any]) -> None:
    until(lambda: get(record["address"], 80) == KEPT, SETTLE_S, f"the answer of {record['name']}")


def unharmed(victim: Victim, record: dict[str, Any]) -> None:
    """It is the same machine, which serves, runs commands and writes to its disk."""
    await_serving(record)
    assert victim.instance(record["name"])["status"]["pid"] == record["status"]["pid"]
    written = victim.ok("exec", record["name"], "busybox", "sh", "-c", "echo written > /w; sync; cat /w")
    assert written == "written"


def nothing_of_forks(victim: Victim, *instances: str) -> None:
    """There are just these instances, and no moment and no capture of any."""
    until(lambda: sorted(victim.names("instances")) == sorted(instances), SETTLE_S, f"just {instances}")
    ids = {item["id"] for item in victim.items("instances")}

    def left() -> list[str]:
        found = [*victim.state.glob("moments/*"), *victim.state.glob("instances/*/asleep*")]
        found += [*victim.state.glob("instances/*/origin*")]
        found += [path for path in victim.roots() if path.stem not in ids]
        return [str(path) for path in found]

    with suppress(TimeoutError):
        until(lambda: not left(), 2 * SETTLE_S)
    assert not left()


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """It does nothing meanwhile, but can be killed."""
    send(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            send(pid, signal.SIGCONT)


def await_reader(victim: Victim, verb: str, *, waits: bool = False) -> int:
    """The process that saves or loads pages, once there is one; ``waits``: and it waits for a word of the daemon's."""
    deadline = time.monotonic() + _CATCH_S
    while time.monotonic() < deadline:  # without a pause: it may not be there for long
        for pid in _children(victim.pid):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                argv = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if re.search(f"/pages.py {verb}$", " ".join(argv[:4])) and (not waits or _waits(pid)):
                    return pid
    raise TimeoutError(f"no process began to {verb} pages")


def await_machine(victim: Victim, identifier: str) -> int:
    """The QEMU of an instance, as soon as there is one."""

    def find() -> int | None:
        found = victim.processes_of(identifier)
        return next((pid for pid, name in found.items() if name == "qemu-system-x86_64"), None)

    found = until(find, _CATCH_S, "a machine")
    assert found is not None
    return found


def _waits(pid: int) -> bool:
    return Path(f"/proc/{pid}/syscall").read_text().startswith(_READING)


def _children(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError):
            yield from map(int, path.read_text().split())
