"""Forks: what is kept, what is renewed, and what cannot be forked."""

import json
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root

COUNTS = "echo 1 > /dev/shm/only-in-memory; i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.05; done"


def counting(daemon: Daemon, name: str, *flags: str) -> None:
    daemon.ok("run", "-d", "--name", name, "--isolation", "vm", *flags, "busybox", "sh", "-c", COUNTS)
    until(lambda: daemon.ok("exec", name, "cat", "/count").strip().isdigit())


def inside(daemon: Daemon, name: str, script: str) -> str:
    return daemon.ok("exec", name, "sh", "-c", script)


def count(daemon: Daemon, name: str) -> int:
    return int(inside(daemon, name, "cat /count"))


def test_a_fork_goes_on_where_its_original_was(daemon: Daemon) -> None:
    """Memory, files and processes; then each has its own, and the original never noticed."""
    counting(daemon, "web")
    inside(daemon, "web", "echo kept > /file; echo 127a > /etc/machine-id")
    before = count(daemon, "web")
    assert daemon.ok("fork", "--name", "twin", "web") == "twin"
    assert count(daemon, "twin") >= before
    assert inside(daemon, "twin", "cat /file /dev/shm/only-in-memory") == "kept\n1"
    inside(daemon, "twin", "echo changed > /file")
    assert inside(daemon, "web", "cat /file") == "kept"
    seen = count(daemon, "web")
    until(lambda: count(daemon, "web") > seen and count(daemon, "twin") > before)
    assert inside(daemon, "twin", "hostname; cat /etc/hostname") == "twin\ntwin"
    assert "twin" in inside(daemon, "twin", "cat /etc/hosts")
    assert len(inside(daemon, "twin", "cat /etc/machine-id")) == 32
    assert inside(daemon, "web", "cat /etc/machine-id") == "127a"
    web, twin = daemon.instance("web"), daemon.instance("twin")
    assert web["address"] != twin["address"]
    assert twin["origin"]["instance"] == "web"


def test_forks_of_one_moment_and_forks_of_forks(daemon: Daemon) -> None:
    counting(daemon, "first")
    names = daemon.ok("fork", "--count", "3", "--name-prefix", "copy-", "first").split()
    assert names == ["copy-1", "copy-2", "copy-3"]
    moments = {daemon.instance(name)["origin"]["moment"] for name in names}
    assert len(moments) == 1
    random = {inside(daemon, name, "head -c 16 /dev/urandom | od -An -tx1") for name in (*names, "first")}
    assert len(random) == 4
    inside(daemon, "copy-2", "echo second generation > /dev/shm/word")
    daemon.ok("fork", "--name", "grandchild", "copy-2")
    assert inside(daemon, "grandchild", "cat /dev/shm/word") == "second generation"
    assert inside(daemon, "copy-1", "ls /dev/shm") == "only-in-memory"


def test_a_fork_lives_on_by_itself(daemon: Daemon) -> None:
    """Without its original, through a restart of the daemon, and through one of its own, which boots from its disk."""
    counting(daemon, "old")
    inside(daemon, "old", "echo kept > /file")
    daemon.ok("fork", "--name", "young", "old")
    daemon.ok("rm", "-f", "old")
    daemon.stop()
    daemon.start()
    seen = count(daemon, "young")
    until(lambda: count(daemon, "young") > seen)
    daemon.ok("restart", "-t", "0", "young")
    assert inside(daemon, "young", "cat /file; ls /dev/shm") == "kept\nonly-in-memory"


def test_published_ports_stay_with_the_original(daemon: Daemon) -> None:
    counting(daemon, "open", "-p", "127.0.0.1:18080:80")
    daemon.ok("fork", "--name", "closed", "open")
    assert daemon.instance("closed")["spec"]["ports"] == []


def test_one_that_sees_its_own_address_sees_the_forks(daemon: Daemon) -> None:
    """And is reached there, by what listened before."""
    serve = ("sh", "-c", "while :; do nc -l -p 7 -e echo here; done")
    daemon.ok("run", "-d", "--name", "web", "--isolation", "vm", "--inside-address", "same", "busybox", *serve)
    until(lambda: inside(daemon, "web", "netstat -tln").count(":7 "))
    daemon.ok("fork", "--name", "twin", "web")
    daemon.ok("run", "-d", "--name", "client", "busybox", "sleep", "600")
    for name in ("web", "twin"):
        address = daemon.instance(name)["address"]
        shown = inside(daemon, name, "ip -4 -o address show dev eth0; ip route")
        assert f"inet {address}/32" in shown
        assert f"src {address}" in shown
        ask = ("exec", "client", "sh", "-c", f"nc -w 5 {address} 7 </dev/null")
        until(lambda ask=ask: daemon.cli(*ask).stdout == "here\n")  # type: ignore[misc]
    assert daemon.instance("web")["address"] not in inside(daemon, "twin", "ip address; ip route")


def test_one_that_sees_what_all_see_gets_a_fork_that_sees_its_own_address(daemon: Daemon) -> None:
    daemon.ok("run", "-d", "--name", "web", "--isolation", "vm", "busybox", "sleep", "600")
    assert daemon.instance("web")["address"] not in inside(daemon, "web", "ip address")
    daemon.ok("fork", "--new-inside-address", "--name", "twin", "web")
    address = daemon.instance("twin")["address"]
    shown = inside(daemon, "twin", "ip -4 -o address show dev eth0; ip route")
    assert f"inet {address}/32" in shown
    assert f"src {address}" in shown
    daemon.ok("run", "-d", "--name", "client", "busybox", "sleep", "600")
    daemon.ok("exec", "client", "ping", "-c", "1", "-W", "10", address)
    daemon.ok("run", "-d", "--name", "box", "--isolation", "sandbox", "busybox", "sleep", "600")
    assert "always sees its own address" in daemon.fails("fork", "--new-inside-address", "box")


def test_what_a_fork_took_is_told(daemon: Daemon) -> None:
    counting(daemon, "web")
    daemon.ok("fork", "--name", "twin", "web")
    forks = [
        found
        for found in json.loads(daemon.ok("operation", "ls", "--format", "json"))
        if found["verb"] == "instance.fork" and found["target"] == "instance/twin"
    ]
    steps = {step["name"] for step in forks[0]["steps"]}
    assert {"capture", "create", "start"} <= steps


def test_a_container_refuses_by_name(daemon: Daemon) -> None:
    daemon.ok("run", "-d", "--name", "shared", "busybox", "sleep", "600")
    said = daemon.fails("fork", "shared")
    assert "a container cannot be forked" in said
    assert "--isolation sandbox or vm" in said


def test_what_cannot_be_forked_says_why(daemon: Daemon, tmp_path: Path) -> None:
    assert "does not exist" in daemon.fails("fork", "nobody")
    daemon.ok("create", "--name", "idle", "--isolation", "vm", "busybox", "sleep", "600")
    assert "idle is created: only a running one can be forked" in daemon.fails("fork", "idle")
    counting(daemon, "holder", "-v", f"{tmp_path}:/data")
    assert f"holder has {tmp_path} mounted" in daemon.fails("fork", "holder")
    assert "--name names one fork" in daemon.fails("fork", "--name", "x", "--count", "2", "holder")
