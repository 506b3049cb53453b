"""The disk of the state directory is full: one clear error, nothing half made, and all is well when there is space."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.fault.disk import Disk, refused
from tests.fault.host import SETTLE_S, Service, Victim, fill, send, warm
from tests.integration.daemon import until

pytestmark = pytest.mark.root
_MACHINES_BYTES = 768 << 20
_TRIES = 3000  # commits find room in what the store's log has already taken


@pytest.fixture
def victim(cramped_victim: Victim) -> Victim:
    return cramped_victim


def test_image_import(victim: Victim, disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(16 << 20))
    tar = tmp_path / "big.tar"
    subprocess.run(["tar", "-C", tmp_path, "-cf", tar, "big"], check=True)
    body = {"name": "big", "path": str(tar), "format": "rootfs"}
    disk.fill(leave_bytes=20 << 20)  # it holds the copy, not what is unpacked from it
    refused(victim, "POST", "/v1/images/import", body)
    assert not any("big" in name for name in victim.names("images"))
    assert not any((victim.state / "images/tmp").iterdir())
    disk.free()
    victim.done("POST", "/v1/images/import", body)


def test_run(victim: Victim, disk: Disk) -> None:
    """A few blocks are left: the store can say what the instance wanted, but the instance finds no room."""
    disk.fill()
    error: dict[str, Any] = {}
    for number in range(_TRIES):
        status, found = victim.api(
            "POST", "/v1/instances", {"name": f"n{number}", "spec": {"image": "busybox", "command": ["true"]}}
        )
        error = found["error"] if status >= 400 else victim.outcome(found).get("error") or {}
        if error:
            break
    assert error.get("code") == "exhausted", error
    disk.free()
    victim.settle()
    assert victim.ok("run", "--rm", "busybox", "cat", "/etc/hostname")


@pytest.mark.slow
@pytest.mark.parametrize("disk", [_MACHINES_BYTES], indirect=True)
def test_run_a_machine(victim: Victim, disk: Disk) -> None:
    """No template is left half made; a machine that runs is told of it and does not stand still."""
    spec = {"image": "busybox", "isolation": "vm", "command": ["sleep", "600"]}
    disk.fill(leave_bytes=80 << 20)
    refused(victim, "POST", "/v1/instances", {"name": "it", "spec": spec})
    until(lambda: not victim.names("instances"), SETTLE_S, "no instance")
    assert not list((victim.state / "qemu/templates").glob("*"))
    disk.free()
    warm(victim)
    victim.done("POST", "/v1/instances", {"name": "it", "spec": spec})
    disk.fill()
    done = victim.cli("exec", "it", "sh", "-c", "dd if=/dev/zero of=/f bs=1M count=64 && sync")
    disk.free()
    assert done.returncode != 0 or victim.ok("exec", "it", "ls", "/f")
    victim.done("POST", "/v1/instances/it/stop", {"grace_s": 0})
    victim.done("POST", "/v1/instances/it/start", {})
    assert victim.ok("exec", "it", "cat", "/etc/hostname")


def test_commit(victim: Victim, disk: Disk) -> None:
    """What is asked for is refused, what runs goes on, and what ends meanwhile is known when there is space."""
    fill(victim, "data")
    service = Service(victim, "web")
    service.run()
    service.check()
    victim.ok("run", "-d", "--name", "ends", "busybox", "sleep", "600")
    pid = victim.instance("ends")["status"]["pid"]
    disk.fill()
    errors = []
    for number in range(_TRIES):
        status, found = victim.api("POST", "/v1/networks", {"name": f"n{number}"})
        if status >= 400:
            errors.append(found["error"]["code"])
            break
    assert errors == ["exhausted"]
    send(pid, 9)
    service.await_answer("127.0.0.1", service.port)
    assert victim.api("GET", "/v1/version")[0] == 200
    assert victim.names("instances")
    disk.free()
    until(lambda: victim.phase("ends") == "exited", SETTLE_S, "the end that was not written at first")
    assert victim.instance("ends")["status"].get("exit_code") in {137, None}  # its monitor found no room to write it
    service.check()


def test_killed_on_a_full_disk(victim: Victim, disk: Disk) -> None:
    """What runs serves on; once there is space a daemon finds it again."""
    fill(victim, "data")
    service = Service(victim, "web")
    service.run()
    service.check()
    pid = service.pid
    disk.fill()
    victim.kill9()
    service.await_answer("127.0.0.1", service.port)
    began = len(victim.log())
    with suppress(AssertionError):  # it may still find room in the store's log
        victim.start()
    disk.free()
    if victim.ended:
        said = victim.log()[began:].strip().splitlines()
        assert "is full" in said[-1], said
        assert not any("Traceback" in line for line in said)
        victim.start()
    service.check()
    assert service.pid == pid


def test_volume_write(victim: Victim, disk: Disk) -> None:
    """The disk under a volume is full: the writer fails, nobody else; the volume is whole when there is space."""
    fill(victim, "data")
    victim.done("POST", "/v1/volumes", {"name": "wide", "size_bytes": 64 << 20})
    victim.ok("run", "-d", "--name", "writer", "-v", "wide:/w", "busybox", "sleep", "600")
    disk.fill(leave_bytes=8 << 20)
    done = victim.cli("exec", "writer", "sh", "-c", "dd if=/dev/zero of=/w/f bs=1M count=48 && sync")
    assert victim.api("GET", "/v1/version")[0] == 200
    disk.free()
    assert done.returncode != 0 or victim.ok("exec", "writer", "ls", "/w")
    victim.done("POST", "/v1/instances/writer/stop", {"grace_s": 0})  # its volume is checked when mounted again
    victim.done("POST", "/v1/instances/writer/start", {})
    victim.ok("exec", "writer", "sh", "-c", "dd if=/dev/zero of=/w/g bs=1M count=4 && sync")


def test_snapshot(victim: Victim, disk: Disk) -> None:
    """Nothing is kept by halves; an instance that cannot go back stays what it is, and does when there is space."""
    victim.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    victim.ok("exec", "web", "sh", "-c", "dd if=/dev/urandom of=/big bs=1M count=16; echo old > /state; sync")
    body = {"instance": "web", "name": "kept"}
    disk.fill(leave_bytes=8 << 20)
    refused(victim, "POST", "/v1/snapshots", body)
    assert not victim.names("snapshots")
    assert not list((victim.state / "snapshots").iterdir())
    assert victim.ok("exec", "web", "cat", "/state") == "old"
    disk.free()
    victim.done("POST", "/v1/snapshots", body)
    victim.ok("exec", "web", "sh", "-c", "echo new > /state")
    disk.fill(leave_bytes=8 << 20)
    refused(victim, "POST", "/v1/snapshots/kept/restore", {})
    assert (victim.state / "instances" / victim.instance("web")["id"] / "upper/state").read_text() == "new\n"
    disk.free()
    victim.done("POST", "/v1/instances/web/start", {})
    assert victim.ok("exec", "web", "cat", "/state") == "old"
