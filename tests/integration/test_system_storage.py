"""Volumes as users see them."""

import json

import pytest

from tests.integration.daemon import Daemon

pytestmark = pytest.mark.root


def shell(daemon: Daemon, isolation: str, mount: str, script: str) -> str:
    flags = ("--rm", "--isolation", isolation, "-v", mount)
    return daemon.ok("run", *flags, "busybox", "sh", "-c", script)


def test_data_outlives_its_instance(daemon: Daemon) -> None:
    """What a container wrote, a sandbox reads, owned by the same user."""
    daemon.ok("volume", "create", "data", "--size", "16m")
    shell(daemon, "container", "data:/d", "echo kept > /d/f; chown 1000:1000 /d/f")
    assert shell(daemon, "sandbox", "data:/d", "cat /d/f; stat -c %u:%g /d/f") == "kept\n1000:1000"
    shell(daemon, "sandbox", "data:/d", "echo more > /d/g")
    assert shell(daemon, "container", "data:/d", "cat /d/g; stat -c %u:%g /d/g") == "more\n0:0"


def test_data_survives_recreation_of_a_volume_not(daemon: Daemon) -> None:
    """A new volume of the same name is empty."""
    daemon.ok("volume", "create", "data", "--size", "16m")
    shell(daemon, "container", "data:/d", "echo old > /d/f")
    daemon.ok("volume", "rm", "data")
    daemon.ok("volume", "create", "data", "--size", "16m")
    assert "f" not in shell(daemon, "container", "data:/d", "ls /d").split()


def test_size_holds(daemon: Daemon, isolation: str) -> None:
    daemon.ok("volume", "create", "small", "--size", "16m")
    said = shell(daemon, isolation, "small:/d", "dd if=/dev/zero of=/d/f bs=1M count=32 2>&1; stat -c %s /d/f")
    assert "No space left" in said
    assert int(said.splitlines()[-1]) < 16 << 20


def test_read_only_volume(daemon: Daemon, isolation: str) -> None:
    daemon.ok("volume", "create", "data", "--size", "16m")
    said = shell(daemon, isolation, "data:/d:ro", "touch /d/f 2>&1 || ls /d/f 2>&1; :")
    assert "Read-only file system" in said


def test_shared_between_a_container_and_a_sandbox(daemon: Daemon) -> None:
    """Both at the same time: what one writes, the other reads; neither end takes it from the other."""
    daemon.ok("volume", "create", "data", "--size", "16m")
    for isolation in ("container", "sandbox"):
        flags = ("--isolation", isolation, "--mount", "type=volume,source=data,target=/d")
        daemon.ok("run", "-d", "--name", isolation, *flags, "busybox", "sleep", "600")
    daemon.ok("exec", "container", "sh", "-c", "echo c > /d/c")
    assert daemon.ok("exec", "sandbox", "cat", "/d/c") == "c"
    daemon.ok("exec", "sandbox", "sh", "-c", "echo s > /d/s")
    assert daemon.ok("exec", "container", "cat", "/d/s") == "s"
    daemon.ok("rm", "-f", "container")
    assert daemon.ok("exec", "sandbox", "cat", "/d/c") == "c"


def test_not_removed_while_used(daemon: Daemon) -> None:
    """Not even by an instance that has ended; then it goes, and its disk with it."""
    daemon.ok("volume", "create", "data", "--size", "16m")
    daemon.ok("run", "--name", "user", "-v", "data:/d", "busybox", "true")
    assert "user" in daemon.fails("volume", "rm", "data")
    daemon.ok("rm", "user")
    daemon.ok("volume", "rm", "data")
    assert daemon.names("volumes") == []


def test_made_when_first_named(daemon: Daemon) -> None:
    """As docker does: a volume that does not exist is made by run, and stays."""
    daemon.ok("run", "--rm", "-v", "fresh:/d", "busybox", "touch", "/d/x")
    assert daemon.names("volumes") == ["fresh"]
    assert "x" in shell(daemon, "container", "fresh:/d", "ls /d").split()
    (volume,) = json.loads(daemon.ok("volume", "inspect", "--format", "json", "fresh"))
    assert volume["size_bytes"] == 10 << 30


def test_mounted_at_the_users_place(daemon: Daemon) -> None:
    """An unprivileged user of the image can write where the volume was made his."""
    daemon.ok("volume", "create", "data", "--size", "16m")
    shell(daemon, "container", "data:/d", "chown user /d")
    said = daemon.ok("run", "--rm", "-u", "user", "-v", "data:/d", "busybox", "sh", "-c", "touch /d/f; stat -c %U /d/f")
    assert said == "user"
