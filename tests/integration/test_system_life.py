"""Instances outlive the daemon; the daemon outlives everything but its state directory."""

import os
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, free_port, until
from tests.integration.test_system_network import fetch, serve

pytestmark = pytest.mark.root

TICKER = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.2; done"
ENDINGS = (signal.SIGTERM, signal.SIGKILL)


def run(daemon: Daemon, name: str, isolation: str, script: str, *flags: str) -> None:
    daemon.ok("run", "-d", "--name", name, "--isolation", isolation, *flags, "busybox", "sh", "-c", script)


def process_exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_instances_outlive_the_daemon(fresh_daemon: Daemon, isolation: str, ending: signal.Signals) -> None:
    """Same process, unbroken log, open port, exec; its end is seen by the next daemon."""
    daemon, port = fresh_daemon, free_port()
    run(daemon, "ticker", isolation, TICKER)
    serve(daemon, "web", "--isolation", isolation, "-p", f"{port}:80")
    pid = daemon.instance("ticker")["status"]["pid"]
    daemon.stop(ending)
    assert process_exists(pid)
    assert fetch("127.0.0.1", port) == "hello"
    time.sleep(0.5)
    daemon.start()
    status = daemon.instance("ticker")["status"]
    assert (status["phase"], status["pid"], status.get("restarts", 0)) == ("running", pid, 0)
    assert fetch("127.0.0.1", port) == "hello"
    assert daemon.ok("exec", "ticker", "echo", "alive") == "alive"
    _assert_unbroken(daemon)
    daemon.ok("kill", "ticker")
    status = daemon.wait_phase("ticker", "exited")["status"]
    assert status["exit_code"] == 137


def _assert_unbroken(daemon: Daemon) -> None:
    """Every tick is in the log, and more come."""
    seen = [int(line.split()[1]) for line in daemon.ok("logs", "ticker").splitlines()]
    assert seen == list(range(1, len(seen) + 1))
    until(lambda: len(daemon.ok("logs", "ticker").splitlines()) > len(seen))


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_end_while_the_daemon_was_away(fresh_daemon: Daemon, isolation: str, ending: signal.Signals) -> None:
    """It is reported with its code and the time it really happened."""
    daemon = fresh_daemon
    run(daemon, "short", isolation, "sleep 0.6; exit 42")
    pid = daemon.instance("short")["status"]["pid"]
    daemon.stop(ending)
    until(lambda: not process_exists(pid))
    time.sleep(1.0)
    daemon.start()
    status = daemon.wait_phase("short", "exited")["status"]
    assert (status["exit_code"], status["reason"]) == (42, "exited")
    started, ended = status["started_at"], status["finished_at"]
    assert started < ended
    assert (_seconds(ended) - _seconds(started)) < 1.5


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_out_of_memory_while_the_daemon_was_away(fresh_daemon: Daemon) -> None:
    daemon = fresh_daemon
    run(daemon, "eater", "container", "sleep 1; exec dd if=/dev/zero of=/dev/null bs=200M count=1", "-m", "64m")
    pid = daemon.instance("eater")["status"]["pid"]
    daemon.kill9()
    until(lambda: not process_exists(pid))
    daemon.start()
    assert daemon.wait_phase("eater", "exited")["status"]["reason"] == "out of memory"


def test_restart_policy_goes_on_after_a_kill(fresh_daemon: Daemon) -> None:
    """What ended while the daemon was away is started again, once."""
    daemon = fresh_daemon
    run(daemon, "loop", "container", "echo run; sleep 600", "--restart", "always")
    pid = daemon.instance("loop")["status"]["pid"]
    daemon.kill9()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not process_exists(pid))
    daemon.start()
    until(lambda: daemon.phase("loop") == "running" and daemon.instance("loop")["status"]["pid"] != pid)
    assert daemon.instance("loop")["status"]["restarts"] == 1
    until(lambda: daemon.ok("logs", "loop").count("run") == 2)


def test_a_log_follower_and_a_waiter_survive_nothing_silently(fresh_daemon: Daemon) -> None:
    """Clients that were connected end with an error that says so; they neither hang nor claim success."""
    daemon = fresh_daemon
    run(daemon, "ticker", "container", TICKER)
    clients = [
        subprocess.Popen(daemon.argv(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for words in (("logs", "-f", "ticker"), ("exec", "ticker", "sleep", "60"), ("events",))
    ]
    until(lambda: "sleep 60" in daemon.ok("exec", "ticker", "ps"))
    time.sleep(0.3)
    daemon.kill9()
    for client in clients:
        said = client.communicate(timeout=10)[1]
        assert client.returncode != 0, client.args
        assert "Traceback" not in said
        assert said.strip(), client.args
    daemon.start()


def test_a_stop_does_not_wait_for_clients(fresh_daemon: Daemon) -> None:
    """Long polls and streams do not hold the daemon up."""
    daemon = fresh_daemon
    run(daemon, "ticker", "container", TICKER)
    clients = [
        subprocess.Popen(daemon.argv(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for words in (("logs", "-f", "ticker"), ("exec", "ticker", "sleep", "60"), ("events",), ("wait", "ticker"))
    ]
    time.sleep(0.5)
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < 5
    for client in clients:
        client.wait(timeout=10)
    daemon.start()


def test_a_second_daemon_is_refused(fresh_daemon: Daemon) -> None:
    """On the same state: one clear line, exit code 1, and the first goes on undisturbed."""
    daemon = fresh_daemon
    run(daemon, "ticker", "container", TICKER)
    second = subprocess.run(daemon.serve_argv, capture_output=True, text=True, timeout=20, check=False)
    assert second.returncode == 1
    lines = [line for line in second.stderr.splitlines() if line.startswith("alveole serve: ")]
    assert len(lines) == 1, second.stderr
    assert str(daemon.state) in lines[0]
    assert "Traceback" not in second.stderr
    assert daemon.phase("ticker") == "running"
    assert daemon.ok("exec", "ticker", "echo", "alive") == "alive"


def test_two_daemons_side_by_side(fresh_daemon: Daemon, other_daemon: Daemon) -> None:
    """The same names on both; neither sees, touches or outlives the other's."""
    ports = {fresh_daemon: free_port(), other_daemon: free_port()}
    for daemon, text in ((fresh_daemon, "first"), (other_daemon, "second")):
        daemon.ok("volume", "create", "data", "--size", "16m")
        serve(daemon, "web", "-v", "data:/d", "-p", f"{ports[daemon]}:80", text=text)
    assert fresh_daemon.instance("web")["address"] != other_daemon.instance("web")["address"]
    fresh_daemon.clear()
    assert fresh_daemon.stop() == 0
    assert fetch("127.0.0.1", ports[other_daemon]) == "second"
    assert other_daemon.ok("exec", "web", "wget", "-qO-", "http://127.0.0.1/") == "second"
    fresh_daemon.start()


def test_reboot(fresh_daemon: Daemon) -> None:
    """What has a restart policy comes back with files, address and port; the rest says what happened."""
    daemon, port = fresh_daemon, free_port()
    daemon.ok("volume", "create", "data", "--size", "16m")
    for isolation in ("container", "sandbox"):
        run(
            daemon,
            f"always-{isolation}",
            isolation,
            "echo b >> /d/boots; sleep 600",
            "--restart",
            "always",
            "-v",
            "data:/d",
        )
        run(daemon, f"no-{isolation}", isolation, "sleep 600")
    run(daemon, "failing", "container", "sleep 600", "--restart", "on-failure")
    run(daemon, "stopped", "container", "sleep 600", "--restart", "unless-stopped")
    daemon.ok("stop", "-t", "0", "stopped")
    serve(daemon, "web", "--restart", "unless-stopped", "-p", f"{port}:80")
    daemon.ok("exec", "web", "touch", "/kept")
    address = daemon.instance("web")["address"]
    daemon.reboot()
    for name in ("always-container", "always-sandbox", "web", "failing"):
        daemon.wait_phase(name, "running")
    for isolation in ("container", "sandbox"):
        status = daemon.wait_phase(f"no-{isolation}", "exited")["status"]
        assert status["reason"] == "host restarted"
    assert daemon.phase("stopped") == "exited"
    assert daemon.instance("web")["address"] == address
    until(lambda: daemon.cli("exec", "web", "true").returncode == 0)
    assert daemon.ok("exec", "web", "ls", "/kept") == "/kept"
    assert until(lambda: fetch("127.0.0.1", port)) == "hello"
    until(lambda: daemon.ok("exec", "always-container", "cat", "/d/boots").count("b") == 4)
    daemon.ok("start", "no-container")
    assert daemon.phase("no-container") == "running"


def test_stop_of_the_daemon_undoes_what_is_under_way(fresh_daemon: Daemon) -> None:
    """Stopped in the middle of many starts: afterwards each runs once."""
    daemon = fresh_daemon
    clients = [
        subprocess.Popen(
            daemon.argv("run", "-d", "--name", f"n{i}", "busybox", "sleep", "600"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(12)
    ]
    until(lambda: len(daemon.names("instances")) >= 4)
    daemon.stop()
    for client in clients:
        client.wait(timeout=20)
    daemon.start()
    names = daemon.names("instances")
    for name in names:
        daemon.wait_phase(name, "running")
    sleepers = [pid for pid in daemon.processes() if Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x00600\x00"]
    assert len(sleepers) == len(names)


def test_a_removal_survives_a_kill(fresh_daemon: Daemon) -> None:
    """A daemon killed while it removes finishes that when it is back."""
    daemon = fresh_daemon
    for i in range(4):
        run(daemon, f"n{i}", "container", "sleep 600")
    remover = subprocess.Popen(daemon.argv("rm", "-f", "n0", "n1", "n2", "n3"), stdout=subprocess.DEVNULL)
    until(lambda: len(daemon.names("instances")) < 4)
    daemon.kill9()
    remover.kill()  # it would wait for the daemon to come back
    remover.wait()
    daemon.start()
    until(lambda: all(i["desired"] != "removed" for i in daemon.api("GET", "/v1/instances")[1]["items"]))


def test_the_command_line_says_that_the_daemon_is_away(fresh_daemon: Daemon) -> None:
    daemon = fresh_daemon
    for ending in ENDINGS:
        daemon.stop(ending)
        for words in (("ls",), ("run", "--rm", "busybox", "true"), ("image", "ls")):
            said = daemon.fails(*words)
            assert "daemon" in said
            assert str(daemon.socket) in said
            assert len(said.splitlines()) <= 2
        daemon.start()
