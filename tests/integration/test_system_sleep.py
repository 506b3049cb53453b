"""Sleep and wake: all that an instance is goes to disk and comes back."""

import subprocess
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root

COUNTS = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; sleep 0.05; done"


def counting(daemon: Daemon, name: str) -> None:
    daemon.ok("run", "-d", "--name", name, "--isolation", "vm", "busybox", "sh", "-c", COUNTS)
    until(lambda: daemon.ok("exec", name, "cat", "/dev/shm/count").strip().isdigit())


def count(daemon: Daemon, name: str) -> int:
    return int(daemon.ok("exec", name, "cat", "/dev/shm/count"))


def machines(daemon: Daemon, name: str) -> int:
    """How many QEMU processes the instance has."""
    identifier = daemon.instance(name)["id"]
    return len(
        subprocess.run(
            ["pgrep", "-f", f"qemu-system-x86_64 -name {identifier}"], capture_output=True, check=False
        ).stdout.split()
    )


def test_what_sleeps_uses_nothing_and_goes_on_where_it_was(daemon: Daemon) -> None:
    counting(daemon, "web")
    before, address = count(daemon, "web"), daemon.instance("web")["address"]
    assert machines(daemon, "web") == 1
    assert daemon.ok("sleep", "web") == "web"
    assert daemon.phase("web") == "asleep"
    assert machines(daemon, "web") == 0
    assert "not running" in daemon.fails("exec", "web", "true")
    daemon.ok("wake", "web")
    assert before <= count(daemon, "web") < before + 200
    assert daemon.instance("web")["address"] == address
    seen = count(daemon, "web")
    until(lambda: count(daemon, "web") > seen)


def test_it_sleeps_through_restarts_of_the_daemon_and_again(daemon: Daemon) -> None:
    counting(daemon, "web")
    daemon.ok("sleep", "web")
    daemon.stop()
    daemon.start()
    assert daemon.phase("web") == "asleep"
    daemon.ok("wake", "web")
    before = count(daemon, "web")
    daemon.ok("sleep", "web")
    daemon.ok("wake", "web")
    assert before <= count(daemon, "web") < before + 200


def test_it_wakes_as_who_it_was(daemon: Daemon) -> None:
    """It is no clone: nothing else goes on from what was kept of it."""
    who = "hostname; cat /etc/machine-id /etc/ssh/ssh_host_x_key /proc/sys/kernel/random/boot_id"
    counting(daemon, "web")
    kept = "echo 127a > /etc/machine-id; mkdir /etc/ssh; echo secret > /etc/ssh/ssh_host_x_key"
    daemon.ok("exec", "web", "sh", "-c", kept)
    before = daemon.ok("exec", "web", "sh", "-c", who)
    assert before.startswith("web\n127a\nsecret\n")
    daemon.ok("sleep", "web")
    daemon.ok("wake", "web")
    assert daemon.ok("exec", "web", "sh", "-c", who) == before


def test_stopping_what_sleeps_lets_it_begin_anew(daemon: Daemon) -> None:
    counting(daemon, "web")
    daemon.ok("exec", "web", "sh", "-c", "echo 1 > /dev/shm/word")
    daemon.ok("sleep", "web")
    daemon.ok("stop", "web")
    assert daemon.phase("web") == "exited"
    daemon.ok("start", "web")
    until(lambda: daemon.ok("exec", "web", "cat", "/dev/shm/count").strip().isdigit())
    assert daemon.ok("exec", "web", "ls", "/dev/shm") == "count"
    daemon.ok("sleep", "web")
    daemon.ok("rm", "-f", "web")


def test_a_container_refuses_by_name(daemon: Daemon) -> None:
    daemon.ok("run", "-d", "--name", "shared", "busybox", "sleep", "600")
    assert "a container cannot be put to sleep" in daemon.fails("sleep", "shared")
    assert daemon.phase("shared") == "running"


def test_what_does_not_run_cannot_sleep(daemon: Daemon) -> None:
    daemon.ok("create", "--name", "idle", "--isolation", "vm", "busybox", "true")
    assert "idle is created: only a running one can be put to sleep" in daemon.fails("sleep", "idle")


def test_with_a_shared_directory_it_stays_awake(daemon: Daemon, tmp_path: Path) -> None:
    daemon.ok("run", "-d", "--name", "holder", "--isolation", "vm", "-v", f"{tmp_path}:/d", "busybox", "sleep", "600")
    assert f"holder has {tmp_path} mounted" in daemon.fails("sleep", "holder")
    assert daemon.ok("exec", "holder", "sh", "-c", "echo on > /d/f; cat /d/f") == "on"


def test_volumes_are_held_while_it_sleeps(daemon: Daemon) -> None:
    """What it knows of them and had not written yet is true when it wakes: nobody else could change them."""
    flags = ("--isolation", "vm", "-v", "one:/one")
    daemon.ok("run", "-d", "--name", "db", *flags, "busybox", "sleep", "600")
    daemon.ok("volume", "attach", "two", "db", "/two")
    daemon.ok("exec", "db", "sh", "-c", "echo first > /one/state; echo second > /two/state; (sleep 600 > /one/open) &")
    daemon.ok("sleep", "db")
    daemon.stop()
    daemon.start()
    for volume in ("one", "two"):
        refused = daemon.fails("run", "--rm", "-v", f"{volume}:/v", "busybox", "true")
        assert f"volume {volume} is held by instance db" in refused
    daemon.ok("wake", "db")
    assert daemon.ok("exec", "db", "cat", "/one/state", "/two/state") == "first\nsecond"
    daemon.ok("exec", "db", "sh", "-c", "echo third > /two/state")
    daemon.ok("volume", "detach", "two", "db")
    assert daemon.ok("run", "--rm", "-v", "two:/v", "busybox", "cat", "/v/state") == "third"
    daemon.ok("sleep", "db")
    daemon.ok("stop", "db")
    assert daemon.ok("run", "--rm", "-v", "one:/v", "busybox", "cat", "/v/state") == "first"


def test_a_fork_begins_asleep_and_goes_on_from_that_moment(daemon: Daemon) -> None:
    counting(daemon, "web")
    daemon.ok("fork", "--paused", "--count", "2", "--name-prefix", "later-", "web")
    seen = count(daemon, "web")
    assert {daemon.phase(name) for name in ("later-1", "later-2")} == {"asleep"}
    assert machines(daemon, "later-1") == 0
    daemon.ok("rm", "-f", "web")
    daemon.stop()
    daemon.start()
    daemon.ok("wake", "later-1")
    assert 0 < count(daemon, "later-1") < seen + 200
    assert daemon.ok("exec", "later-1", "hostname") == "later-1"
    daemon.ok("stop", "later-2")
    assert daemon.phase("later-2") == "exited"
    daemon.ok("start", "later-2")
    until(lambda: daemon.ok("exec", "later-2", "cat", "/dev/shm/count").strip().isdigit())
