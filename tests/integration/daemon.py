"""A real daemon of its own on this host, driven by its command line and API as a user would."""

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tests import inventory

T = TypeVar("T")
FAULTS = ("Traceback (most recent call last)", "event loop held")
START_S = 30.0
STOP_S = 30.0
POLL_S = 0.02
SETTLE_S = 3.0
_UID_WINDOW = 1 << 28


def until(probe: Callable[[], T], timeout_s: float = 30.0, what: str = "") -> T:
    """Ask until the answer is true, and return it. Raises TimeoutError with the last answer."""
    deadline = time.monotonic() + timeout_s
    while not (answer := probe()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what or 'it'} did not come true within {timeout_s:g} s; last: {answer!r}")
        time.sleep(POLL_S)
    return answer


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Daemon:
    """``state`` outlives stop, kill and reboot; ``run`` is a short path for sockets, gone with a reboot."""

    def __init__(self, state: Path, run: Path, env: Mapping[str, str] | None = None) -> None:
        self.state, self.run_dir = state, run
        self.socket = run / "s"
        self.log_path = state.with_name(f"{state.name}.log")
        self.env = {**os.environ, "ALVEOLE_TEST_LOOP_LIMIT_MS": "20", **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions: list[int] = []  # of each start: what the daemon ran for itself is in it
        self._forwarded_before = _forwards()
        self._checked = 0  # how far the log has been read for faults

    # --- its life ----------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return str(self._identity()["id"])

    def _identity(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state / "host.json").read_text())
        return found

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def serve_argv(self) -> list[str]:
        own = [sys.executable, "-m", "alveole", "--socket", str(self.socket)]
        return [*own, "serve", "--state", str(self.state), "--run-dir", str(self.run_dir), "--node", "testnode"]

    def start(self) -> None:
        """Returns when it answers. Raises AssertionError with its log if it ended instead."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.serve_argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, start_new_session=True
            )
        self._sessions.append(self._process.pid)
        until(self._answers, START_S, "the daemon's answer")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the daemon ended:\n{self.log()}"
        try:
            return self.api("GET", "/v1/version")[0] == 200
        except OSError:
            return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end; return its exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        code = self._process.wait(timeout=STOP_S)
        self._process = None
        return code

    def kill9(self) -> None:
        self.stop(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    @property
    def running(self) -> bool:
        return self._process is not None

    def reboot(self) -> None:
        """Leave what a host has after a power cut: the state directory, and nothing else."""
        self._clear_host()
        self.start()

    def destroy(self) -> None:
        """End it with all it holds, whatever state it is in."""
        if (self.state / "host.json").exists():
            self._clear_host()
            Path("/run/alveole-claims", self.id).unlink(missing_ok=True)
        elif self._process is not None:
            self.kill9()
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def _clear_host(self) -> None:
        if self._process is not None:
            self.kill9()
        until(self._kill_all, what="the end of all processes")
        for target in reversed(self._mount_points()):
            subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)
        subprocess.run(["nft", "delete", "table", "inet", f"alveole_{self.id}"], check=False, capture_output=True)
        for device in Path("/sys/class/net").glob(f"av{self.id[:4]}*"):
            subprocess.run(["ip", "link", "delete", device.name], check=False, capture_output=True)
        subprocess.run(["ip", "route", "delete", "unreachable", self._pool], check=False, capture_output=True)
        for cgroup in self._cgroups():
            until(lambda path=cgroup: _removed(path), what=f"removal of {cgroup}")  # type: ignore[misc]
        shutil.rmtree(self.run_dir, ignore_errors=True)

    @property
    def _pool(self) -> str:
        return str(self._identity()["pool"])

    def _kill_all(self) -> bool:
        pids = set(self.processes())
        for pid in pids:
            _kill(pid)
        return not pids

    def _mount_points(self) -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        points = [line.split(" ")[4] for line in lines]
        return [p for p in points if p == str(self.run_dir) or p.startswith((f"{self.run_dir}/", f"{self.state}/"))]

    def _cgroups(self) -> list[Path]:
        """Deepest first."""
        tops = [path for path in Path("/sys/fs/cgroup").glob(f"*/alveole-{self.id}") if path.is_dir()]
        tops += [path for path in [Path("/sys/fs/cgroup", f"alveole-{self.id}")] if path.is_dir()]
        found = [path for top in tops for path in (top, *(p for p in top.rglob("*") if p.is_dir()))]
        return sorted(found, key=lambda path: -len(path.parts))

    def processes(self) -> Iterator[int]:
        """All that run because of it: in its cgroups or sessions, with its ids, or naming its directories."""
        base = self._identity()["window"] * _UID_WINDOW
        for path in Path("/proc").glob("[0-9]*"):
            try:
                stat = (path / "stat").read_text().rpartition(")")[2].split()
                argv = (path / "cmdline").read_bytes().decode(errors="replace")
                mine = int(stat[3]) in self._sessions or f"alveole-{self.id}" in (path / "cgroup").read_text()
                mine = mine or base <= path.stat().st_uid < base + _UID_WINDOW
            except (FileNotFoundError, ProcessLookupError):
                continue
            if stat[0] != "Z" and (mine or f"{self.run_dir}/" in argv or f"{self.state}/" in argv):
                yield int(path.name)

    def leftovers(self) -> list[str]:
        """What is on the host because of it, as the inventory sees it. Empty after it stopped with no instance."""
        names = (self.id, f"av{self.id[:4]}", f"unreachable {self._pool}", str(self.run_dir), str(self.state))
        nothing = inventory.Inventory(**dict.fromkeys(inventory.Inventory.__dataclass_fields__, frozenset()))
        host = inventory.take()
        found = inventory.difference(nothing, host)
        lines = [line for line in found if any(name in line for name in names) and "alveole-claims" not in line]
        if _forwards() and not self._forwarded_before and not any("alveole_" in table for table in host.tables):
            lines.append("the host forwards packets, and did not before")
        return [*lines, *(f"process {pid}: {_argv(pid)}" for pid in self.processes())]

    # --- what it says ------------------------------------------------------------------------------------------------

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def new_faults(self) -> list[str]:
        """Lines of its log, since last asked, that no daemon should write, each with what follows it."""
        lines = self.log().splitlines()
        new, start, self._checked = lines[self._checked :], self._checked, len(lines)
        hits = [start + i for i, line in enumerate(new) if any(fault in line for fault in FAULTS)]
        return ["\n".join(lines[max(hit - 1, 0) : hit + 40]) for hit in hits]

    # --- asking it ---------------------------------------------------------------------------------------------------

    def argv(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "alveole", "--socket", str(self.socket), *args]

    def cli(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002  (as subprocess.run calls it)
        timeout: float = 90,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command line. Without ``input`` its standard input is empty."""
        return subprocess.run(
            self.argv(*args), input=input or "", capture_output=True, text=True, timeout=timeout, check=False
        )

    def ok(self, *args: str, input: str | None = None, timeout: float = 90) -> str:  # noqa: A002
        """The output of a command line that must succeed."""
        done = self.cli(*args, input=input, timeout=timeout)
        assert done.returncode == 0, f"{args} ended with {done.returncode}: {done.stdout}{done.stderr}\n{self.log()}"
        return done.stdout.strip()

    def fails(self, *args: str, code: int | None = None, timeout: float = 90) -> str:
        """What a command line says that must fail: one clear error, nothing else."""
        done = self.cli(*args, timeout=timeout)
        assert done.returncode != 0, f"{args} succeeded: {done.stdout}"
        assert code is None or done.returncode == code, f"{args} ended with {done.returncode}: {done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("error: ") <= 1, done.stderr
        assert done.stderr.strip(), f"{args} said nothing"
        return done.stderr.strip()

    def api(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """(status, JSON) of a request."""
        connection = _Connection(self.socket)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def instance(self, ref: str) -> dict[str, Any]:
        status, found = self.api("GET", f"/v1/instances/{ref}")
        assert status == 200, found
        assert isinstance(found, dict)
        return found

    def phase(self, ref: str) -> str:
        return str(self.instance(ref)["status"]["phase"])

    def wait_phase(self, ref: str, phase: str, timeout_s: float = 30.0) -> dict[str, Any]:
        until(lambda: self.phase(ref) == phase, timeout_s, f"phase {phase} of {ref}")
        return self.instance(ref)

    def names(self, plural: str) -> list[str]:
        return [item["name"] for item in self.api("GET", f"/v1/{plural}")[1]["items"]]

    def clear(self) -> None:
        """Remove every instance, snapshot, volume and network, in this order."""
        self._remove_all("instances", "rm", "-f")
        self._remove_all("snapshots", "snapshot", "rm")
        self._remove_all("volumes", "volume", "rm")
        self._remove_all("networks", "network", "rm")

    def _remove_all(self, plural: str, *words: str) -> None:
        """Some may be on their way out by themselves."""
        if names := self.names(plural):
            done = self.cli(*words, *names)
            until(lambda: not self.names(plural), what=f"an end of all {plural} ({done.stderr})")


def _forwards() -> bool:
    return Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"


def make_daemon(directory: Path, env: Mapping[str, str] | None = None) -> Daemon:
    return Daemon(directory / "state", Path(f"/run/alv-t-{secrets.token_hex(2)}"), env)


def finish(daemon: Daemon) -> None:
    """Stop it with no instance left: then the host must be as it was."""
    try:
        if daemon.running:
            daemon.clear()
            assert daemon.stop() == 0, daemon.log()
        faults, left = daemon.new_faults(), _settled(daemon)
    finally:
        daemon.destroy()
    assert not faults, "\n".join(faults)
    assert not left, "the daemon left behind:\n" + "\n".join(left)


def _settled(daemon: Daemon) -> list[str]:
    deadline = time.monotonic() + SETTLE_S
    while (left := daemon.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _argv(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return "(ended)"


def _removed(cgroup: Path) -> bool:
    try:
        cgroup.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # its processes are about to vanish
        return False
    return True
