"""Volumes that come to a running machine and leave it."""

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root


def machine(daemon: Daemon, name: str, *flags: str) -> None:
    daemon.ok("run", "-d", "--name", name, "--isolation", "vm", *flags, "busybox", "sleep", "600")


def inside(daemon: Daemon, name: str, script: str) -> str:
    return daemon.ok("exec", name, "sh", "-c", script)


def test_attached_kept_through_a_restart_and_detached(daemon: Daemon) -> None:
    machine(daemon, "web")
    assert daemon.ok("volume", "attach", "data", "web", "/srv/my  *data") == "data"
    inside(daemon, "web", "echo kept > '/srv/my  *data/file'")
    assert "used by web" in daemon.fails("volume", "rm", "data")
    daemon.ok("restart", "-t", "1", "web")
    assert inside(daemon, "web", "cat '/srv/my  *data/file'") == "kept"
    daemon.ok("volume", "detach", "data", "web")
    assert inside(daemon, "web", "ls -A '/srv/my  *data'") == ""
    assert daemon.ok("run", "--rm", "-v", "data:/d", "busybox", "cat", "/d/file") == "kept"
    daemon.ok("restart", "-t", "1", "web")
    assert daemon.instance("web")["spec"]["mounts"] == []


def test_one_that_it_began_with_can_leave_and_come_back_read_only(daemon: Daemon) -> None:
    machine(daemon, "web", "-v", "data:/d")
    inside(daemon, "web", "echo kept > /d/file")
    daemon.ok("volume", "detach", "data", "web")
    daemon.ok("volume", "attach", "--read-only", "data", "web", "/ro")
    assert inside(daemon, "web", "cat /ro/file; touch /ro/x 2>/dev/null || echo refused") == "kept\nrefused"


def test_it_stays_while_it_is_used(daemon: Daemon) -> None:
    daemon.ok("run", "-d", "--name", "web", "--isolation", "vm", "-v", "data:/d", "-w", "/d", "busybox", "sleep", "600")
    assert "uses files of the volume" in daemon.fails("volume", "detach", "data", "web")
    assert len(daemon.instance("web")["spec"]["mounts"]) == 1
    assert inside(daemon, "web", "echo on > /d/file; cat /d/file") == "on"


def test_a_second_holder_is_refused_and_what_was_asked_is_taken_back(daemon: Daemon) -> None:
    machine(daemon, "first", "-v", "data:/d")
    machine(daemon, "second")
    said = daemon.fails("volume", "attach", "data", "second", "/d")
    assert "volume data is held by instance first" in said
    until(lambda: daemon.instance("second")["spec"]["mounts"] == [])
    assert "cannot mount it at /bin/busybox" in daemon.fails("volume", "attach", "other", "second", "/bin/busybox")
    daemon.ok("volume", "attach", "other", "second", "/other")


def test_refusals_say_what_to_do(daemon: Daemon) -> None:
    daemon.ok("run", "-d", "--name", "shared", "busybox", "sleep", "600")
    said = daemon.fails("volume", "attach", "data", "shared", "/d")
    assert "a container cannot be given volumes while it runs" in said
    assert "-v" in said
    machine(daemon, "web")
    assert "does not have volume data" in daemon.fails("volume", "detach", "data", "web")
    assert "not absolute" in daemon.fails("volume", "attach", "data", "web", "d")
    assert "nothing may be mounted at /proc/d" in daemon.fails("volume", "attach", "data", "web", "/proc/d")
    daemon.ok("stop", "-t", "0", "web")
    assert "web is exited" in daemon.fails("volume", "attach", "data", "web", "/d")
