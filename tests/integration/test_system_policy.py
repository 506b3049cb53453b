"""The life of an instance while its daemon runs: start, stop, restart, health, wait, operations, output formats."""

import itertools
import json
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, free_port, until
from tests.registry import running_registry

pytestmark = pytest.mark.root

DEAF = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
GENTLE = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done"


def detached(daemon: Daemon, name: str, isolation: str, script: str, *flags: str) -> None:
    daemon.ok("run", "-d", "--name", name, "--isolation", isolation, *flags, "busybox", "sh", "-c", script)


def ready(daemon: Daemon, name: str) -> None:
    until(lambda: "ready" in daemon.ok("logs", name))


def test_create_start_stop_start(daemon: Daemon, isolation: str) -> None:
    """Files stay between two runs; the second begins with the same address."""
    script = "cat /seen 2>/dev/null; echo again > /seen; sleep 600"
    daemon.ok("create", "--name", "web", "--isolation", isolation, "busybox", "sh", "-c", script)
    assert daemon.phase("web") == "created"
    daemon.ok("start", "web")
    address = daemon.instance("web")["address"]
    daemon.ok("stop", "-t", "0", "web")
    assert daemon.instance("web")["status"]["reason"] == "stopped"
    daemon.ok("start", "web")
    until(lambda: "again" in daemon.ok("logs", "web"))
    assert daemon.instance("web")["address"] == address
    assert daemon.phase("web") == "running"


def test_stop_lets_it_end(daemon: Daemon, isolation: str) -> None:
    detached(daemon, "gentle", isolation, GENTLE)
    ready(daemon, "gentle")
    daemon.ok("stop", "gentle")
    status = daemon.instance("gentle")["status"]
    assert (status["phase"], status["exit_code"], status["reason"]) == ("exited", 3, "stopped")
    assert daemon.ok("logs", "--tail", "1", "gentle") == "bye"


def test_stop_kills_what_does_not_listen(daemon: Daemon, isolation: str) -> None:
    """After the grace, and not before."""
    detached(daemon, "deaf", isolation, DEAF)
    ready(daemon, "deaf")
    began = time.monotonic()
    daemon.ok("stop", "-t", "1", "deaf")
    assert 1.0 <= time.monotonic() - began < 5
    status = daemon.instance("deaf")["status"]
    assert (status["phase"], status["exit_code"]) == ("exited", 137)


def test_signals(daemon: Daemon, isolation: str) -> None:
    """kill -s sends this signal and no other; --stop-signal is what stop sends."""
    script = "trap 'echo usr' USR1; trap 'exit 5' QUIT; echo ready; while :; do sleep 0.1; done"
    detached(daemon, "hears", isolation, script, "--stop-signal", "QUIT")
    ready(daemon, "hears")
    daemon.ok("kill", "-s", "USR1", "hears")
    until(lambda: "usr" in daemon.ok("logs", "hears"))
    assert daemon.phase("hears") == "running"
    daemon.ok("stop", "hears")
    assert daemon.instance("hears")["status"]["exit_code"] == 5
    assert "not running" in daemon.fails("kill", "hears")
    assert "NONSENSE" in daemon.fails("kill", "-s", "NONSENSE", "hears")


def test_restart(daemon: Daemon, isolation: str) -> None:
    detached(daemon, "web", isolation, "echo ready; sleep 600")
    before = daemon.instance("web")["status"]
    daemon.ok("restart", "-t", "0", "web")
    after = daemon.instance("web")["status"]
    assert after["phase"] == "running"
    assert after["pid"] != before["pid"]
    assert after.get("restarts", 0) == 0
    until(lambda: daemon.ok("logs", "web").count("ready") == 2)


def test_remove_needs_force_while_it_runs(daemon: Daemon) -> None:
    detached(daemon, "web", "container", "sleep 600")
    assert "running" in daemon.fails("rm", "web")
    daemon.ok("rm", "-f", "web")
    assert daemon.names("instances") == []


def test_wait(daemon: Daemon, isolation: str) -> None:
    """Prints the exit code of each, and of those that ended before."""
    detached(daemon, "slow", isolation, "sleep 0.5; exit 4")
    assert daemon.ok("wait", "slow") == "4"
    assert daemon.ok("wait", "slow", "slow") == "4"


def test_restart_on_failure_ends(daemon: Daemon, isolation: str) -> None:
    """on-failure:2 starts it three times in all, with a growing pause, and keeps the last code."""
    detached(daemon, "bad", isolation, "echo run; exit 9", "--restart", "on-failure:2")
    assert daemon.ok("wait", "bad") == "9"
    status = daemon.instance("bad")["status"]
    assert (status["phase"], status["restarts"], status["exit_code"]) == ("exited", 2, 9)
    lines = daemon.ok("logs", "--timestamps", "bad").splitlines()
    times = [datetime.fromisoformat(line.split()[0]) for line in lines]
    assert len(times) == 3
    gaps = [(later - sooner).total_seconds() for sooner, later in itertools.pairwise(times)]
    assert gaps[0] >= 0.1
    assert gaps[1] >= 0.2


def test_on_failure_leaves_success_alone(daemon: Daemon) -> None:
    detached(daemon, "good", "container", "echo run; exit 0", "--restart", "on-failure")
    assert daemon.ok("wait", "good") == "0"
    assert daemon.instance("good")["status"].get("restarts", 0) == 0


def test_restart_always(daemon: Daemon, isolation: str) -> None:
    """Also after success, until it is stopped; what was killed comes back too."""
    detached(daemon, "loop", isolation, "echo run; sleep 0.2", "--restart", "always")
    until(lambda: daemon.instance("loop")["status"].get("restarts", 0) >= 2)
    daemon.ok("stop", "-t", "0", "loop")
    runs = daemon.ok("logs", "loop").count("run")
    time.sleep(1)
    assert daemon.phase("loop") == "exited"
    assert daemon.ok("logs", "loop").count("run") == runs


def test_a_killed_instance_comes_back(daemon: Daemon) -> None:
    detached(daemon, "web", "container", "sleep 600", "--restart", "always")
    before = daemon.instance("web")["status"]["pid"]
    daemon.ok("kill", "web")
    until(lambda: daemon.phase("web") == "running" and daemon.instance("web")["status"]["pid"] != before)
    assert daemon.instance("web")["status"]["restarts"] == 1


def test_health(daemon: Daemon, isolation: str) -> None:
    """Starting, healthy, unhealthy after the retries, and healthy again; shown by ls."""
    flags = ("--health-cmd", "test -e /ok", "--health-interval", "200ms", "--health-retries", "2")
    detached(daemon, "web", isolation, "touch /ok; sleep 600", *flags)

    def health(expected: str) -> bool:
        return f"({expected})" in daemon.ok("ls")

    until(lambda: health("healthy"))
    daemon.ok("exec", "web", "rm", "/ok")
    until(lambda: health("unhealthy"))
    daemon.ok("exec", "web", "touch", "/ok")
    until(lambda: health("healthy"))
    assert daemon.phase("web") == "running"


def test_a_check_that_hangs_is_unhealthy(daemon: Daemon) -> None:
    flags = ("--health-cmd", "sleep 500", "--health-interval", "200ms", "--health-timeout", "200ms")
    detached(daemon, "web", "container", "sleep 600", *flags, "--health-retries", "1")
    until(lambda: daemon.instance("web")["status"].get("health") == "unhealthy")
    daemon.ok("stop", "-t", "0", "web")
    assert daemon.phase("web") == "exited"


def test_many_at_once(daemon: Daemon) -> None:
    """Sixteen started and removed by clients at the same time: each has its own name, address and port."""
    ports = [free_port() for _ in range(16)]
    clients = [
        subprocess.Popen(
            daemon.argv("run", "-d", "--name", f"n{i}", "-p", f"{port}:80", "busybox", "sleep", "600"),
            stdout=subprocess.DEVNULL,
        )
        for i, port in enumerate(ports)
    ]
    assert [client.wait(timeout=60) for client in clients] == [0] * 16
    items = daemon.api("GET", "/v1/instances")[1]["items"]
    assert {item["status"]["phase"] for item in items} == {"running"}
    assert len({item["address"] for item in items}) == 16
    removers = [subprocess.Popen(daemon.argv("rm", "-f", f"n{i}"), stdout=subprocess.DEVNULL) for i in range(16)]
    assert [client.wait(timeout=60) for client in removers] == [0] * 16
    assert daemon.names("instances") == []


def test_operations(daemon: Daemon) -> None:
    """Each action is recorded with its steps and what they took."""
    daemon.ok("run", "--name", "once", "busybox", "true")
    (operation,) = [
        item
        for item in json.loads(daemon.ok("operation", "ls", "--format", "json"))
        if item["target"] == "instance/once"
    ]
    assert (operation["verb"], operation["state"]) == ("instance.run", "done")
    shown = daemon.ok("operation", "show", operation["id"])
    for step in ("image", "network", "root", "create", "start"):
        assert step in shown
    assert "does not exist" in daemon.fails("operation", "show", "0" * 16)
    assert daemon.fails("operation", "cancel", operation["id"])


def test_cancel_a_pull(daemon: Daemon, tmp_path: Path) -> None:
    """A pull that hangs is ended by its user: the operation says so, and nothing of it is left."""
    (tmp_path / "registry").mkdir()
    with running_registry(tmp_path / "registry") as registry:
        registry._process.send_signal(signal.SIGSTOP)
        try:
            pull = subprocess.Popen(
                daemon.argv("image", "pull", "--no-tls-verify", f"{registry.address}/web:1"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            (identifier,) = until(lambda: _running(daemon))
            daemon.ok("operation", "cancel", identifier)
            said = pull.communicate(timeout=10)[0]
        finally:
            registry._process.send_signal(signal.SIGCONT)
    assert pull.returncode == 1
    assert "cancelled" in said
    assert not [name for name in daemon.names("images") if "web" in name]
    until(lambda: not [pid for pid in daemon.processes() if b"skopeo" in Path(f"/proc/{pid}/cmdline").read_bytes()])


def _running(daemon: Daemon) -> list[str]:
    return [item["id"] for item in daemon.api("GET", "/v1/operations")[1]["items"] if item["state"] == "running"]


def test_cancel_a_run_that_waits_for_its_image(daemon: Daemon, tmp_path: Path) -> None:
    """The pull it waits for goes with it; the name is free again."""
    (tmp_path / "registry").mkdir()
    with running_registry(tmp_path / "registry") as registry:
        registry._process.send_signal(signal.SIGSTOP)
        try:
            run = subprocess.Popen(
                daemon.argv("run", "-d", "--name", "late", f"{registry.address}/web:1"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            until(lambda: "late" in daemon.names("instances"))
            operation = daemon.instance("late")["operation"]
            daemon.ok("operation", "cancel", operation)
            said = run.communicate(timeout=10)[1]
        finally:
            registry._process.send_signal(signal.SIGCONT)
    assert run.returncode == 125
    assert "cancelled" in said
    until(lambda: _running(daemon) == [])
    until(lambda: daemon.names("instances") == [])


def test_formats(daemon: Daemon) -> None:
    """JSON, YAML and table tell the same."""
    daemon.ok("create", "--name", "web", "-p", f"{free_port()}:80", "busybox", "true")
    found = json.loads(daemon.ok("inspect", "--format", "json", "web"))
    assert found[0]["name"] == "web"
    assert "name: web" in daemon.ok("inspect", "--format", "yaml", "web")
    listed = json.loads(daemon.ok("ls", "--format", "json"))
    assert listed[0]["id"] == found[0]["id"]
    head, row = daemon.ok("ls").splitlines()
    assert head.split()[:2] == ["NAME", "ID"]
    assert row.split()[:2] == ["web", found[0]["id"]]
    assert daemon.ok("ls", "--quiet") == found[0]["id"]
    assert "web" not in daemon.ok("ps")


def test_repeated_request_is_done_once(daemon: Daemon) -> None:
    """The same idempotency key returns the first operation; with another body it is refused."""
    body = {"spec": {"image": "busybox", "command": ["true"]}, "start": False}
    first = daemon.api("POST", "/v1/instances", body, {"Idempotency-Key": "k1"})
    again = daemon.api("POST", "/v1/instances", body, {"Idempotency-Key": "k1"})
    assert first[1]["id"] == again[1]["id"]
    assert len(daemon.names("instances")) == 1
    other = daemon.api("POST", "/v1/instances", {**body, "start": True}, {"Idempotency-Key": "k1"})
    assert other[0] == 409


def test_unknown_fields_are_named(daemon: Daemon) -> None:
    status, answer = daemon.api("POST", "/v1/instances", {"spec": {"image": "busybox", "comand": ["true"]}})
    assert status == 400
    assert "comand" in json.dumps(answer)
    assert "command" in answer["error"]["message"] + answer["error"].get("hint", "")
