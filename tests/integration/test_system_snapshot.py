"""Snapshots and copies: files, volumes and memory of one moment, gone back to and begun from."""

import json

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root

WALLS = ["container", "sandbox", pytest.param("vm", marks=pytest.mark.slow)]  # of it others have a test of their own
COUNTS = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; sleep 0.05; done"


def run(daemon: Daemon, name: str, isolation: str, *options: str, script: str = "exec sleep 600") -> None:
    daemon.ok("run", "-d", "--name", name, "--isolation", isolation, *options, "busybox", "sh", "-c", script)


def inside(daemon: Daemon, name: str, script: str) -> str:
    return daemon.ok("exec", name, "sh", "-c", script)


def count(daemon: Daemon, name: str) -> int:
    until(lambda: inside(daemon, name, "cat /dev/shm/count 2>/dev/null; true").isdigit())
    return int(inside(daemon, name, "cat /dev/shm/count"))


def test_files_and_volumes_go_back_together(daemon: Daemon, isolation: str) -> None:
    run(daemon, "db", isolation, "-v", "data:/data")
    inside(daemon, "db", "echo old > /state; echo old > /data/state; rm /bin/true; sync")
    before = daemon.instance("db")
    assert daemon.ok("snapshot", "create", "--name", "first", "db") == "first"
    assert daemon.phase("db") == "running"
    inside(daemon, "db", "echo new > /state; echo new > /data/state; echo more > /data/more; sync")
    assert daemon.ok("snapshot", "restore", "first") == "db"
    after = daemon.instance("db")
    assert (after["id"], after["address"]) == (before["id"], before["address"])
    assert inside(daemon, "db", "cat /state /data/state; ls /data/more /bin/true 2>/dev/null; true") == "old\nold"
    inside(daemon, "db", "echo again > /state")
    daemon.ok("restart", "-t", "0", "db")
    assert inside(daemon, "db", "cat /state") == "again"
    daemon.ok("snapshot", "rm", "first")
    daemon.ok("restart", "-t", "0", "db")
    assert inside(daemon, "db", "cat /state /data/state") == "again\nold"


@pytest.mark.parametrize("isolation", WALLS)
def test_one_that_has_ended_is_kept_and_begun_from(daemon: Daemon, isolation: str) -> None:
    run(daemon, "db", isolation, "-v", "data:/data")
    inside(
        daemon,
        "db",
        "cp /bin/busybox /home/su; chown 1000:2000 /home/su; chmod 6755 /home/su; ln -s home /link; ln /home/su /hard;"
        " mkfifo /pipe; echo old > /data/state; rm /bin/true; sync",
    )
    daemon.ok("stop", "-t", "0", "db")
    daemon.ok("snapshot", "create", "--name", "kept", "db")
    assert daemon.phase("db") == "exited"
    daemon.ok("snapshot", "fork", "--name", "young", "kept")
    daemon.ok("snapshot", "rm", "kept")
    assert inside(
        daemon, "young", "stat -c '%u %g %a %h' /home/su; readlink /link; test -p /pipe; ls /bin/true || :"
    ) == ("1000 2000 6755 2\nhome")
    inside(daemon, "young", "echo changed > /data/state; sync")
    daemon.ok("start", "db")
    assert inside(daemon, "db", "cat /data/state") == "old"
    assert sorted(daemon.names("volumes")) == ["data", "young-data"]
    assert daemon.instance("young")["address"] != daemon.instance("db")["address"]
    daemon.ok("recreate", "young")
    assert inside(daemon, "young", "ls /home/su 2>/dev/null; cat /data/state") == "changed"


@pytest.mark.parametrize("isolation", WALLS)
def test_a_copy_is_begun_from_a_running_one(daemon: Daemon, isolation: str) -> None:
    run(daemon, "web", isolation, "-p", "127.0.0.1:8099:80", "-e", "X=1")
    inside(daemon, "web", "echo mine > /state; sync")
    assert daemon.ok("copy", "web", "twin") == "twin"
    assert inside(daemon, "twin", "cat /state; echo $X; hostname") == "mine\n1\ntwin"
    assert daemon.names("snapshots") == []
    assert not daemon.instance("twin")["spec"].get("ports")
    assert "exists" in daemon.fails("copy", "web", "twin")
    assert daemon.names("snapshots") == []


def test_memory_goes_back_and_is_gone_on_from(daemon: Daemon) -> None:
    run(daemon, "vm1", "vm", script=COUNTS)
    seen = count(daemon, "vm1")
    daemon.ok("snapshot", "create", "--name", "moment", "--memory", "vm1")
    until(lambda: count(daemon, "vm1") > seen + 60)
    later = count(daemon, "vm1")
    daemon.ok("snapshot", "fork", "--name", "past", "moment")
    assert seen <= count(daemon, "past") < later
    daemon.ok("snapshot", "restore", "moment")
    assert seen <= count(daemon, "vm1") < later
    daemon.ok("snapshot", "rm", "moment")
    daemon.ok("restart", "-t", "0", "vm1")
    assert count(daemon, "vm1") < seen + 60


def test_memory_and_volumes_go_back_together(daemon: Daemon) -> None:
    run(daemon, "db", "vm", "-v", "data:/data")
    inside(daemon, "db", "echo old > /data/state; echo old > /dev/shm/state; cat /data/state")
    daemon.ok("snapshot", "create", "--name", "moment", "--memory", "db")
    inside(daemon, "db", "echo new > /data/state; echo new > /dev/shm/state; sync")
    daemon.ok("snapshot", "restore", "moment")
    assert inside(daemon, "db", "cat /data/state /dev/shm/state; sync") == "old\nold"
    assert "only that one can go on from it" in daemon.fails("snapshot", "fork", "moment")
    daemon.ok("stop", "-t", "0", "db")
    assert daemon.ok("run", "--rm", "-v", "data:/d", "busybox", "cat", "/d/state") == "old"


def test_snapshots_outlive_the_daemon_and_the_host(fresh_daemon: Daemon) -> None:
    daemon = fresh_daemon
    run(daemon, "db", "vm", script=COUNTS)
    run(daemon, "web", "container")
    inside(daemon, "web", "echo old > /state")
    seen = count(daemon, "db")
    daemon.ok("snapshot", "create", "--name", "moment", "--memory", "db")
    daemon.ok("snapshot", "create", "--name", "files", "web")
    daemon.restart()
    daemon.reboot()
    listed = json.loads(daemon.ok("snapshot", "ls", "--format", "json"))
    assert [item["name"] for item in listed] == ["moment", "files"]
    daemon.ok("rm", "-f", "db", "web")
    daemon.ok("snapshot", "fork", "--name", "past", "moment")
    assert count(daemon, "past") >= seen
    daemon.ok("snapshot", "fork", "--name", "old", "files")
    assert inside(daemon, "old", "cat /state") == "old"


def test_what_cannot_be_done_is_refused_by_name(daemon: Daemon) -> None:
    run(daemon, "web", "container")
    daemon.ok("create", "--name", "new", "busybox", "true")
    assert "choose --isolation sandbox or vm" in daemon.fails("snapshot", "create", "--memory", "web")
    assert "nothing to keep" in daemon.fails("snapshot", "create", "new")
    assert "instance nobody does not exist" in daemon.fails("snapshot", "create", "nobody")
    assert "not a name" in daemon.fails("snapshot", "create", "--name", "No Name", "web")
    daemon.ok("snapshot", "create", "--name", "one", "web")
    assert "a snapshot named one exists" in daemon.fails("snapshot", "create", "--name", "one", "web")
    for verb in ("restore", "fork", "rm", "inspect"):
        assert "snapshot none does not exist" in daemon.fails("snapshot", verb, "none")
    daemon.ok("rm", "-f", "web")
    assert "instance web does not exist" in daemon.fails("snapshot", "restore", "one")
    run(daemon, "web", "container")
    assert "alveole snapshot fork one" in daemon.fails("snapshot", "restore", "one")
    assert inside(daemon, "web", "echo unharmed") == "unharmed"


def test_a_volume_in_use_by_another_is_not_put_back(daemon: Daemon) -> None:
    run(daemon, "one", "container", "-v", "data:/data")
    run(daemon, "two", "container", "-v", "data:/data")
    inside(daemon, "one", "echo old > /data/state; echo old > /state")
    daemon.ok("snapshot", "create", "--name", "shared", "one")
    inside(daemon, "one", "echo new > /data/state; echo new > /state")
    assert "volume data is used by instance two too" in daemon.fails("snapshot", "restore", "shared")
    assert inside(daemon, "two", "cat /data/state") == "new"
    daemon.ok("stop", "-t", "0", "two")
    daemon.ok("start", "one")
    assert inside(daemon, "one", "cat /data/state /state") == "old\nold"


def test_what_changed_is_told(daemon: Daemon) -> None:
    for isolation in ("container", "sandbox"):
        name = f"in-{isolation}"
        run(daemon, name, isolation)
        inside(
            daemon,
            name,
            "echo x > /added; rm /bin/true; echo y >> /etc/passwd; mkdir /dir; printf '' > '/e\033[1m'; sync",
        )
        said = daemon.ok("diff", name).splitlines()
        assert {"A /added", "D /bin/true", "C /etc/passwd", "A /dir"} <= set(said)
        assert "A /e\N{REPLACEMENT CHARACTER}[1m" in said
        daemon.ok("snapshot", "create", "--name", f"one-{isolation}", name)
        inside(daemon, name, "echo longer > /added; rm -r /dir; echo z > /more; sync")
        assert {"C /added", "D /dir", "A /more"} <= set(daemon.ok("snapshot", "diff", f"one-{isolation}").splitlines())
        daemon.ok("snapshot", "create", "--name", f"two-{isolation}", name)
        both = daemon.ok("snapshot", "diff", f"two-{isolation}", f"one-{isolation}").splitlines()
        assert {"C /added", "A /dir", "D /more"} <= set(both)
    run(daemon, "machine", "vm")
    assert "does not look into it" in daemon.fails("diff", "machine")


def test_evidence_is_kept_of_what_is_recreated(daemon: Daemon, isolation: str) -> None:
    run(daemon, "web", isolation)
    inside(daemon, "web", "echo evil > /evil; sync")
    done = daemon.cli("recreate", "--keep-evidence", "web")
    assert (done.returncode, done.stdout) == (0, "web\n")
    assert inside(daemon, "web", "ls /evil 2>/dev/null; true") == ""
    (evidence,) = daemon.names("snapshots")
    assert done.stderr == f"evidence: {evidence}\n"
    assert evidence.startswith("web-evidence-")
    kept = json.loads(daemon.ok("snapshot", "inspect", evidence))[0]
    assert kept.get("memory", False) == (isolation != "container")
    daemon.ok("snapshot", "fork", "--name", "exhibit", "--network", "none", evidence)
    assert inside(daemon, "exhibit", "cat /evil") == "evil"
    assert not daemon.instance("exhibit").get("address")
    gateway = daemon.instance("web")["address"]
    assert inside(daemon, "exhibit", f"ping -c 1 -W 1 {gateway} >/dev/null 2>&1 && echo out; true") == ""


def test_nothing_is_recreated_of_which_no_evidence_can_be_kept(daemon: Daemon) -> None:
    daemon.ok("create", "--name", "new", "busybox", "true")
    assert "nothing to keep" in daemon.fails("recreate", "--keep-evidence", "new")
    assert daemon.phase("new") == "created"
