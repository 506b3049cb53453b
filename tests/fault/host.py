"""A daemon to be killed, what must hold of it whenever it has settled, and the services it runs meanwhile."""

import http.client
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.integration.daemon import Daemon, free_port, until

SETTLE_S = 30.0
KEPT = "kept"  # the file that a service serves, and its content
NOTHING = "sha256:0"
_PROGRAMS = {"container": "httpd", "sandbox": "runsc-gofer", "vm": "qemu-system-x86_64"}
"""What runs on the host once for each instance."""

_IGNORED_FILES = re.compile(r"store\.db|\.lock$|/ns(/|$)|/s$|host\.json|/scratch|storage/pool/roots$")


class Victim(Daemon):
    """A daemon that ends itself at the point written to ``arm``, and notes every point it passes."""

    def __init__(self, state: Path, run: Path) -> None:
        self.arm, self.trace = state.with_name("arm"), state.with_name("trace")
        watched = {"ALVEOLE_TEST_KILL_AT": str(self.arm), "ALVEOLE_TEST_TRACE": str(self.trace)}
        # On a host that is busy with dying and starting daemons the time of callbacks says nothing.
        super().__init__(state, run, {**watched, "ALVEOLE_TEST_LOOP_LIMIT_MS": "0"})

    def points(self) -> list[str]:
        """Passed since the trace was last cleared, without those of the store."""
        text = self.trace.read_text() if self.trace.exists() else ""
        return [point for point in text.splitlines() if not point.startswith("commit:")]

    def answer(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """As ``api``, but a daemon that dies halfway is always an OSError."""
        try:
            return self.api(method, path, body)
        except (http.client.HTTPException, ValueError) as error:
            raise ConnectionError(str(error)) from error

    def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The operation that the daemon accepted. Raises OSError if it died before it could answer."""
        status, found = self.answer(method, path, body)
        assert status in {200, 201, 202}, found
        assert isinstance(found, dict)
        return found

    def done(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The operation when it has succeeded."""
        found = self.outcome(self.ask(method, path, body))
        assert found["state"] == "done", found
        return found

    def outcome(self, operation: dict[str, Any]) -> dict[str, Any]:
        """The operation when it has ended."""
        path = f"/v1/operations/{operation['id']}"
        until(lambda: self.api("GET", path)[1]["state"] != "running", SETTLE_S, f"the end of {operation}")
        found: dict[str, Any] = self.api("GET", path)[1]
        return found

    def await_death(self) -> None:
        assert self._process is not None
        assert self._process.wait(timeout=SETTLE_S) == -signal.SIGKILL, self.log()
        self._process = None
        self.arm.unlink(missing_ok=True)

    def start_and_kill(self, delay_s: float) -> None:
        """Kill it this long after it was begun, ready or not."""
        timer = threading.Timer(delay_s, lambda: send(self.pid, signal.SIGKILL))
        timer.start()
        with suppress(AssertionError):  # it ended before it answered, as it should
            self.start()
        timer.join()
        self.await_death()

    def disks(self) -> list[Path]:
        """Of volumes: in a pool of their own, unless the state directory's filesystem will do."""
        return [*(self.run_dir / "storage/pool").glob("*.img"), *(self.state / "volumes").glob("*.img")]

    def roots(self) -> list[Path]:
        """Root disks of machines, by the ids of their instances."""
        return [*(self.run_dir / "storage/pool/roots").glob("*"), *(self.state / "volumes/roots").glob("*")]

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def items(self, plural: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api("GET", f"/v1/{plural}")[1]["items"]
        return found

    def settle(self) -> None:
        """Wait until no operation is under way, and nothing moves of itself."""

        def moving() -> list[str]:
            active = [op["verb"] for op in self.items("operations") if op["state"] == "running"]
            phases = {"pending", "creating", "backoff"}
            active += [i["name"] for i in self.items("instances") if i["status"]["phase"] in phases]
            return active + [i["name"] for i in self.items("instances") if i["desired"] == "removed"]

        until(lambda: not moving(), SETTLE_S, f"rest (of {moving()})")

    # --- what is on the host -----------------------------------------------------------------------------------------

    def census(self) -> list[str]:
        """All that is here because of it, in a form that is equal whenever it holds the same instances."""
        lines: Counter[str] = Counter()
        for line in self.leftovers():
            field = line.partition(": ")[0]
            if field == "tables":
                lines[line] += 1
            elif not field.startswith("process"):
                lines[field] += 1
        lines.update(f"program {name}" for name in self._programs())
        return [f"{count} x {name}" for name, count in sorted(lines.items())] + sorted(self._files())

    def _programs(self) -> Iterator[str]:
        for pid in self.processes():
            name = _comm(pid)
            if name and not name.startswith(("python", "exe")):
                yield name

    def _files(self) -> Iterator[str]:
        """Of its directories, down to one level below each instance, but nothing of an image or instance's own."""
        for pattern in ("instances/*/*", "snapshots/*", "images/tmp/*", "volumes/*", "volumes/*/*"):
            yield from self._names(self.state, pattern)
        for pattern in ("*", "i/*/*", "storage/*/*"):
            yield from self._names(self.run_dir, pattern)

    @staticmethod
    def _names(root: Path, pattern: str) -> Iterator[str]:
        for path in root.glob(pattern):
            if not _IGNORED_FILES.search(str(path)) and not path.name.endswith(".new"):
                yield str(path.relative_to(root))
            elif path.name.endswith(".new") and path.name != "local.new":
                yield f"half made: {path.relative_to(root)}"

    def processes_of(self, identifier: str) -> dict[int, str]:
        """Every process of an instance, by pid: inside it, its engine's and its monitor."""
        found = {}
        for pid in self.processes():
            try:
                cgroup = Path(f"/proc/{pid}/cgroup").read_text()
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"alveole-{self.id}/{identifier}" in cgroup or identifier in argv:
                found[pid] = Path(argv.partition("\0")[0]).name
        return found


class Service:
    """An instance that serves a file of a volume, as users would see it: by its address and its published port."""

    def __init__(self, daemon: Victim, name: str, isolation: str = "container", volume: str = "data") -> None:
        self.daemon, self.name, self.isolation, self.volume = daemon, name, isolation, volume
        self.port = free_port()
        self.bind = daemon.state.with_name("bind")
        self.bind.mkdir(exist_ok=True)

    def spec(self, **changes: Any) -> dict[str, Any]:
        return {
            "image": "busybox",
            "isolation": self.isolation,
            "command": ["httpd", "-f", "-p", "80", "-h", "/d"],
            "ports": [{"host_port": self.port, "instance_port": 80}],
            "mounts": [
                {"kind": "volume", "source": self.volume, "target": "/d"},
                {"kind": "bind", "source": str(self.bind), "target": "/b"},
            ],
            "health": {"command": ["cat", f"/d/{KEPT}"], "interval_s": 1},
            "stop_grace_s": 5,
            **changes,
        }

    def body(self, **changes: Any) -> dict[str, Any]:
        return {"name": self.name, "spec": self.spec(**changes)}

    @property
    def path(self) -> str:
        return f"/v1/instances/{self.name}"

    def run(self, **changes: Any) -> None:
        self.daemon.done("POST", "/v1/instances", self.body(**changes))

    def record(self) -> dict[str, Any] | None:
        status, found = self.daemon.api("GET", self.path)
        return found if status == 200 else None

    @property
    def pid(self) -> int | None:
        """Of its first process; None while there is none."""
        found: int | None = self.daemon.instance(self.name)["status"].get("pid")
        return found

    def check(self) -> None:
        """It runs once and serves, or does not run at all, as its record says."""
        record = self.record()
        if record is None:
            return
        running = record["status"]["phase"] == "running"
        assert not running or record["desired"] == "running", record
        found = self.daemon.processes_of(record["id"])
        if not running:
            assert not found, f"{self.name} is {record['status']['phase']} but has {found}"
            assert not (self.daemon.run_dir / "i" / record["id"]).exists()
            return
        names = Counter(found.values())
        assert record["status"]["pid"] in found, (record["status"], found)
        assert names["conmon"] == 1, found
        assert names[_PROGRAMS[self.isolation]] == 1, found
        for address, port in ((record["address"], 80), ("127.0.0.1", self.port)):
            self.await_answer(address, port)

    def await_check(self) -> None:
        """``check`` comes true; what is lacking in the end is told."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            try:
                return self.check()
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def await_answer(self, address: str, port: int) -> None:
        until(lambda: get(address, port) == KEPT, what=f"the answer of {self.name} at {address}:{port}")


def get(address: str, port: int) -> str:
    """What is served; empty if nothing."""
    connection = http.client.HTTPConnection(address, port, timeout=2)
    try:
        connection.request("GET", f"/{KEPT}")
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def fill(daemon: Victim, volume: str) -> None:
    """Make a volume that holds what services serve."""
    daemon.done("POST", "/v1/volumes", {"name": volume, "size_bytes": 16 << 20})
    daemon.ok("run", "--rm", "-v", f"{volume}:/d", "busybox", "sh", "-c", f"printf {KEPT} > /d/{KEPT}; sync")


def warm(daemon: Victim) -> None:
    """Let it make what all machines go on from, which takes longer than anything is waited for."""
    daemon.ok("run", "--rm", "--isolation", "vm", "busybox", "true", timeout=120)


def as_guest_root(victim: Victim, record: dict[str, Any], script: str) -> None:
    """Outside the instance. Nobody waits for what the script does to the guest."""
    pid = record["status"]["pid"]
    (key,) = (victim.run_dir / "i" / record["id"]).rglob("key")
    parameters = Path(f"/proc/{pid}/cmdline").read_text()
    address = parameters.partition("control_address=")[2].split(" ")[0]
    options = ["-F", "/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    login = ["ssh", *options, "-i", str(key), f"root@{address}", f"({script}) >/dev/null 2>&1 </dev/null &"]
    subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", *login], check=True, timeout=SETTLE_S)


def same_census(daemon: Victim, expected: list[str]) -> None:
    """What the daemon holds becomes again what it was: pools fill and the kernel tidies up in their own time."""
    found: list[str] = []

    def same() -> bool:
        found[:] = daemon.census()
        return found == expected

    try:
        until(same, SETTLE_S)
    except TimeoutError:
        surplus, missing = Counter(found) - Counter(expected), Counter(expected) - Counter(found)
        raise AssertionError(f"left over: {list(surplus)}; missing: {list(missing)}\n{daemon.log()}") from None


def is_alive(pid: int) -> bool:
    """A zombie is not: how soon it is collected is the host's affair."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def send(pid: int, number: int) -> None:
    os.kill(pid, number)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def reachable(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0
