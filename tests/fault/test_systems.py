"""The daemon is killed at each step of starting a whole operating system. One that does not listen is switched off."""

from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, finish, make_daemon, until

pytestmark = pytest.mark.root

IMAGE = "idle:disk"
_HALT = b"\xf4\xeb\xfd"  # wait for an interrupt, again and again
POINTS = [
    f"start:{step}:{when}"
    for step in ("image", "network", "root", "mounts", "create", "start")
    for when in ("before", "after")
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Path]]:
    """A daemon, and the file that names where it dies. Its image boots to nothing."""
    directory = tmp_path_factory.mktemp("systems")
    point, disk = directory / "point", directory / "idle.raw"
    disk.write_bytes((_HALT + bytes(507) + b"\x55\xaa").ljust(1 << 20, b"\0"))
    made = make_daemon(directory, {"ALVEOLE_TEST_KILL_AT": str(point)})
    try:
        made.start()
        made.ok("image", "import", "--type", "raw", IMAGE, str(disk))
        yield made, point
    finally:
        finish(made)


def machines(daemon: Daemon) -> list[str]:
    return [name for name in map(_name, daemon.processes()) if name.startswith("qemu")]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has ended
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_the_daemon_dies_while_it_starts(shared: tuple[Daemon, Path], point: str) -> None:
    """The next one brings it to run, once; and nothing is left when it is removed."""
    daemon, place = shared
    place.write_text(point)
    body = {"name": "os", "spec": {"image": IMAGE, "isolation": "vm", "user_data": "#!/bin/sh\n"}}
    with suppress(OSError, HTTPException):  # it may die before it answers
        daemon.api("POST", "/v1/instances", body)
    until(lambda: _state(daemon.pid) == "Z", 60, "the end of the daemon")
    daemon.kill9()
    place.unlink()
    daemon.start()
    assert daemon.wait_phase("os", "running", 60)["status"]["restarts"] == 0
    assert len(machines(daemon)) == 1
    daemon.ok("rm", "-f", "os", timeout=60)
    until(lambda: not machines(daemon), what="the end of its machine")
    assert not list((daemon.state / "instances").iterdir())


def test_a_system_that_does_not_listen_is_switched_off(shared: tuple[Daemon, Path]) -> None:
    """The power button first; then after the grace, or at once if asked to."""
    daemon, _ = shared
    daemon.ok("run", "-d", "--name", "os", "--isolation", "vm", IMAGE, timeout=60)
    daemon.ok("kill", "-s", "TERM", "os")
    assert daemon.phase("os") == "running"
    daemon.ok("stop", "-t", "1", "os", timeout=60)
    ended = daemon.instance("os")["status"]
    assert (ended["exit_code"], ended["reason"]) == (137, "stopped")
    daemon.ok("start", "os", timeout=60)
    daemon.ok("kill", "os")
    ended = daemon.wait_phase("os", "exited", 60)["status"]
    assert (ended["exit_code"], ended["reason"]) == (137, "killed by SIGKILL")
    daemon.ok("rm", "os")
