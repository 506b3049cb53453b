"""Templates as users see them: which vms go on from which, and what removing or refreshing one does to vms."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root

MIB = 136  # no other test's machines have so much memory
LONG_S = 180.0  # a template is made meanwhile
COUNTS = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; sleep 0.2; done"


def run(daemon: Daemon, name: str, mib: int = MIB) -> None:
    flags = ("--isolation", "vm", "-m", f"{mib}m")
    daemon.ok("run", "-d", "--name", name, *flags, "busybox", "sh", "-c", COUNTS, timeout=LONG_S)
    until(lambda: daemon.cli("exec", name, "cat", "/dev/shm/count").stdout.strip().isdigit(), LONG_S, f"{name} counts")


def templates(daemon: Daemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(daemon.ok("template", "ls", "--format", "json"))
    return found


def find(daemon: Daemon, mib: int = MIB) -> dict[str, Any] | None:
    return next((one for one in templates(daemon) if one["memory_bytes"] == mib << 20), None)


def template(daemon: Daemon, mib: int = MIB) -> dict[str, Any]:
    found = find(daemon, mib)
    assert found is not None, f"no template of {mib} MiB"
    return found


def goes_on(daemon: Daemon, name: str) -> None:
    """It runs and has kept its memory."""

    def count() -> int:
        return int(daemon.ok("exec", name, "cat", "/dev/shm/count"))

    seen = count()
    until(lambda: count() > seen, what=f"{name} counts on")


def traces(daemon: Daemon) -> list[str]:
    """What there is of the making of templates."""
    half = [str(path) for path in (daemon.state / "qemu/templates").glob("*.*")]
    return half + [str(path) for path in (daemon.run_dir / "t").glob("*")]


def test_the_one_that_vms_go_on_from_is_shown(daemon: Daemon) -> None:
    run(daemon, "web")
    shown = template(daemon)
    machine = daemon.instance("web")["status"]["machine"]
    assert shown["key"] == machine["template"]
    assert {name: shown[name] for name in ("cpus", "kernel", "qemu", "accelerator")} == {
        name: machine[name] for name in ("cpus", "kernel", "qemu", "accelerator")
    }
    assert (shown["node"], shown["instances"], shown["checked"]) == ("testnode", 1, True)
    assert 10 << 20 < shown["size_bytes"] < MIB << 20
    daemon.ok("fork", "--name", "twin", "web", timeout=LONG_S)
    assert template(daemon)["instances"] == 2, "a fork shares its memory too"
    daemon.ok("rm", "-f", "twin")
    daemon.ok("stop", "-t", "0", "web")
    assert template(daemon)["instances"] == 0
    (inspected,) = json.loads(daemon.ok("template", "inspect", shown["key"][:12]))
    assert inspected["key"] == shown["key"]
    assert shown["key"] in daemon.ok("template", "ls").splitlines()[-1] + daemon.ok("template", "ls", "-q")


def test_who_goes_on_from_a_removed_one_notices_nothing(daemon: Daemon) -> None:
    """It runs, is forked, sleeps and wakes; the next one of its shape makes the template anew."""
    run(daemon, "web")
    before = template(daemon)
    removed = daemon.cli("template", "rm", before["key"])
    assert (removed.returncode, removed.stdout.strip()) == (0, before["key"])
    assert "are given back when the instances have ended that go on from it" in removed.stderr
    assert find(daemon) is None
    goes_on(daemon, "web")
    daemon.ok("fork", "--name", "twin", "web", timeout=LONG_S)
    goes_on(daemon, "twin")
    goes_on(daemon, "web")
    daemon.ok("sleep", "web", timeout=LONG_S)
    daemon.ok("wake", "web", timeout=LONG_S)
    goes_on(daemon, "web")
    run(daemon, "next")
    after = template(daemon)
    assert after["key"] == before["key"]
    assert after["created_at"] > before["created_at"]
    assert after["instances"] == 1, "the others have the memory of the old one"
    assert not traces(daemon)


def test_one_made_afresh_is_another_and_running_vms_keep_the_old(daemon: Daemon) -> None:
    run(daemon, "web")
    before = template(daemon)
    assert daemon.ok("template", "refresh", before["key"][:12], timeout=LONG_S) == before["key"]
    after = template(daemon)
    assert after["created_at"] > before["created_at"]
    assert (after["cause"], after["instances"]) == ("refreshed", 0)
    goes_on(daemon, "web")
    daemon.ok("fork", "--name", "twin", "web", timeout=LONG_S)
    goes_on(daemon, "twin")
    run(daemon, "next")
    assert template(daemon)["instances"] == 1
    assert template(daemon)["created_at"] == after["created_at"]
    assert not traces(daemon)


def test_a_cancelled_refresh_leaves_the_old_one_and_nothing_else(daemon: Daemon) -> None:
    run(daemon, "web")
    before = template(daemon)
    status, begun = daemon.api("POST", f"/v1/templates/{before['key']}/refresh", {})
    assert status == 202, begun
    until(lambda: list((daemon.run_dir / "t").glob("*/m/qmp/socket")), LONG_S, "a machine that becomes a template")
    daemon.ok("operation", "cancel", begun["id"])
    until(lambda: not traces(daemon), LONG_S, "an end of all that was made")
    after = template(daemon)
    assert (after["created_at"], after["cause"]) == (before["created_at"], before["cause"])
    goes_on(daemon, "web")


@pytest.mark.parametrize("verb", ["inspect", "rm", "refresh"])
def test_a_wrong_key_is_one_clear_error(daemon: Daemon, verb: str) -> None:
    operations = len(daemon.api("GET", "/v1/operations")[1]["items"])
    said = daemon.fails("template", verb, "0000000000000000", code=1)
    assert said == "error: template 0000000000000000 does not exist (alveole template ls shows all)"
    assert len(daemon.api("GET", "/v1/operations")[1]["items"]) == operations


@pytest.mark.slow
def test_a_damaged_one_is_told_and_the_unused_are_removed(fresh_daemon: Daemon) -> None:
    """Found out by the first vm after a restart that would go on from it."""
    daemon = fresh_daemon
    run(daemon, "web")
    key = template(daemon)["key"]
    daemon.stop()
    damage(daemon.state / "qemu/templates" / key / "memory")
    daemon.start()
    assert not template(daemon)["checked"]
    assert "unchecked" in daemon.ok("template", "ls")
    goes_on(daemon, "web")
    daemon.ok("restart", "-t", "0", "web", timeout=LONG_S)
    assert template(daemon)["cause"] == "damaged"
    assert "made anew: was damaged" in daemon.ok("template", "ls")
    assert f"template {key} is damaged" in daemon.log()
    run(daemon, "other", MIB + 2)
    daemon.ok("rm", "-f", "other")
    assert daemon.ok("template", "rm", "--unused")
    assert [one["key"] for one in templates(daemon)] == [key], "web goes on from it"


def damage(path: Path) -> None:
    """One byte of what it holds is another: in a copy, since a vm has mapped the file itself."""
    with path.open("rb") as file:
        start = os.lseek(file.fileno(), os.fstat(file.fileno()).st_size // 2, os.SEEK_DATA)
        byte = os.pread(file.fileno(), 1, start)
    new = path.with_suffix(".copy")
    subprocess.run(["cp", "--sparse=always", path, new], check=True)
    new.chmod(0o600)
    with new.open("r+b") as file:
        os.pwrite(file.fileno(), bytes([byte[0] ^ 0x55]), start)
    new.rename(path)
