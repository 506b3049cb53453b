"""Sandboxes are forked, sleep, and go back, as machines do."""

import subprocess

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root

COUNTS = "echo $$ > /own; i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; sleep 0.05; done"


def counting(daemon: Daemon, name: str, *options: str) -> None:
    daemon.ok("run", "-d", "--name", name, "--isolation", "sandbox", *options, "busybox", "sh", "-c", COUNTS)
    until(lambda: inside(daemon, name, "cat /dev/shm/count 2>/dev/null; true").isdigit())


def inside(daemon: Daemon, name: str, script: str) -> str:
    return daemon.ok("exec", name, "sh", "-c", script)


def count(daemon: Daemon, name: str) -> int:
    return int(inside(daemon, name, "cat /dev/shm/count"))


def test_forks_go_on_from_one_moment_with_files_of_their_own(daemon: Daemon) -> None:
    counting(daemon, "web", "-p", "127.0.0.1:8098:80")
    inside(daemon, "web", "echo mine > /state; rm /bin/true; chown 1000:2000 /state")
    before = count(daemon, "web")
    assert daemon.ok("fork", "--count", "2", "--name-prefix", "web-", "web").split() == ["web-1", "web-2"]
    for name in ("web-1", "web-2"):
        assert before <= count(daemon, name)
        assert inside(daemon, name, "cat /state; stat -c '%u %g' /state; hostname; ls /bin/true 2>/dev/null; true") == (
            f"mine\n1000 2000\n{name}"
        )
        assert daemon.instance(name)["address"] != daemon.instance("web")["address"]
    inside(daemon, "web-1", "echo changed > /state")
    assert inside(daemon, "web-2", "cat /state") == "mine"
    seen = count(daemon, "web")
    until(lambda: count(daemon, "web") > seen)
    daemon.ok("fork", "--name", "grandchild", "web-1")
    assert inside(daemon, "grandchild", "cat /state") == "changed"
    daemon.ok("rm", "-f", "web", "web-1")
    daemon.ok("restart", "-t", "0", "grandchild")
    until(lambda: inside(daemon, "grandchild", "cat /dev/shm/count 2>/dev/null; true").isdigit())
    assert count(daemon, "grandchild") < seen + 100
    assert inside(daemon, "grandchild", "cat /state") == "changed"


def test_one_sleeps_with_its_volume_and_goes_on(daemon: Daemon) -> None:
    counting(daemon, "db", "-v", "data:/data")
    inside(daemon, "db", "echo kept > /data/state")
    before = count(daemon, "db")
    daemon.ok("sleep", "db")
    assert daemon.phase("db") == "asleep"
    daemon.stop()
    daemon.start()
    daemon.ok("wake", "db")
    assert before <= count(daemon, "db") < before + 200
    assert inside(daemon, "db", "cat /data/state; hostname") == "kept\ndb"


def test_memory_and_files_go_back_together(daemon: Daemon) -> None:
    counting(daemon, "web")
    inside(daemon, "web", "echo old > /state; echo old > /dev/shm/state")
    daemon.ok("snapshot", "create", "--name", "moment", "--memory", "web")
    inside(daemon, "web", "echo new > /state; echo new > /dev/shm/state")
    daemon.ok("snapshot", "fork", "--name", "past", "moment")
    assert inside(daemon, "past", "cat /state /dev/shm/state") == "old\nold"
    daemon.ok("snapshot", "restore", "moment")
    assert inside(daemon, "web", "cat /state /dev/shm/state; hostname") == "old\nold\nweb"


def test_an_exec_under_way_is_told(daemon: Daemon) -> None:
    counting(daemon, "web")
    with_exec = daemon.argv("exec", "web", "sleep", "30")
    with subprocess.Popen(with_exec) as client:
        try:
            until(lambda: "sleep 30" in inside(daemon, "web", "ps"))
            assert "a command is being run" in daemon.fails("fork", "web", timeout=60)
        finally:
            client.kill()
    assert daemon.phase("web") == "running"
