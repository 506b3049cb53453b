"""Recreation: an instance begins anew from its image, and is the same to everybody else."""

import pytest

from tests.integration.daemon import Daemon

pytestmark = pytest.mark.root


def test_files_go_and_name_address_and_volumes_stay(daemon: Daemon, isolation: str) -> None:
    flags = ("--isolation", isolation, "-v", "data:/data")
    daemon.ok("run", "-d", "--name", "web", *flags, "busybox", "sleep", "600")
    daemon.ok("exec", "web", "sh", "-c", "echo bad > /bad; rm /bin/true; echo kept > /data/kept")
    before = daemon.instance("web")
    assert daemon.ok("recreate", "web") == "web"
    after = daemon.instance("web")
    assert (after["id"], after["address"]) == (before["id"], before["address"])
    assert after["status"]["started_at"] != before["status"]["started_at"]
    assert daemon.ok("exec", "web", "sh", "-c", "ls /bad 2>/dev/null; true && cat /data/kept") == "kept"
    assert daemon.ok("exec", "web", "/bin/true") == ""
    daemon.ok("exec", "web", "sh", "-c", "echo again > /bad")
    daemon.ok("restart", "-t", "0", "web")
    assert daemon.ok("exec", "web", "cat", "/bad") == "again"


def test_one_that_has_ended_is_recreated_and_started(daemon: Daemon, isolation: str) -> None:
    script = "cat /seen 2>/dev/null; echo seen > /seen; sleep 600"
    daemon.ok("run", "-d", "--name", "web", "--isolation", isolation, "busybox", "sh", "-c", script)
    daemon.ok("stop", "-t", "0", "web")
    daemon.ok("recreate", "web")
    assert daemon.phase("web") == "running"
    assert daemon.ok("logs", "web") == ""
    assert "nobody does not exist" in daemon.fails("recreate", "nobody")


def test_a_fork_is_recreated_from_its_image_and_what_sleeps_is_awake(daemon: Daemon) -> None:
    daemon.ok("run", "-d", "--name", "old", "--isolation", "vm", "busybox", "sleep", "600")
    daemon.ok("exec", "old", "sh", "-c", "echo bad > /bad")
    daemon.ok("fork", "--name", "young", "old")
    daemon.ok("recreate", "young")
    assert daemon.ok("exec", "young", "sh", "-c", "ls /bad 2>/dev/null; echo gone") == "gone"
    daemon.ok("sleep", "old")
    daemon.ok("recreate", "old")
    assert daemon.ok("exec", "old", "sh", "-c", "ls /bad 2>/dev/null; echo gone") == "gone"
