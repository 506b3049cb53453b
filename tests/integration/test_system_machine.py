"""What of a machine can be chosen, is refused elsewhere, and is told by `inspect`."""

import platform
from pathlib import Path
from typing import Any

import pytest

from tests.integration.daemon import Daemon

pytestmark = pytest.mark.root


def machine(daemon: Daemon, name: str, *flags: str) -> dict[str, Any]:
    """What is told of one that runs."""
    daemon.ok("run", "-d", "--name", name, "--isolation", "vm", "-m", "128m", *flags, "busybox", "sleep", "600")
    assert daemon.ok("exec", name, "echo", "here") == "here"
    told: dict[str, Any] = daemon.instance(name)["status"]["machine"]
    return told


def test_one_that_boots_and_one_that_goes_on_from_a_template(daemon: Daemon) -> None:
    booted = machine(daemon, "booted", "--no-template", "--accel", "tcg")
    assert booted["template"] == ""
    assert booted["accelerator"] == "tcg"
    assert booted["memory_mib"] == 128
    assert booted["cpus"] == 1
    assert booted["machine_type"].startswith("pc-i440fx-")
    assert booted["processor"] == "max"
    assert Path("/boot", f"vmlinuz-{booted['kernel']}").exists()
    assert daemon.ok("exec", "booted", "uname", "-r") == booted["kernel"] != platform.release()
    cloned = machine(daemon, "cloned", "--accel", "tcg")
    assert len(cloned["template"]) == 16
    assert {**cloned, "template": ""} == booted
    assert not {"args", "workdir"} & set(cloned)


@pytest.mark.parametrize("wall", ["container", "sandbox"])
@pytest.mark.parametrize("flags", [("--accel", "tcg"), ("--no-template",)])
def test_others_have_no_machine_and_say_so(daemon: Daemon, wall: str, flags: tuple[str, ...]) -> None:
    said = daemon.fails("run", "-d", "--name", "web", "--isolation", wall, *flags, "busybox", "sleep", "600")
    assert f"a {wall} has no machine to accelerate or to boot" in said


def test_a_container_tells_of_no_machine(daemon: Daemon) -> None:
    daemon.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    assert daemon.instance("web")["status"].get("machine") is None
