"""The disk is full when a machine is captured, or becomes so meanwhile: the machine goes on as if nothing had been."""

from typing import Any

import pytest

from tests.fault.disk import Disk, refused
from tests.fault.frozen import await_reader, await_serving, frozen, nothing_of_forks, serving, unharmed
from tests.fault.host import Victim
from tests.integration.daemon import until

pytestmark = [pytest.mark.root, pytest.mark.parametrize("disk", [1 << 30], indirect=True)]
HELD_MIB = 150  # in the machine's memory
LEFT_BYTES = 80 << 20  # on the disk: too little for that, but more than what is set apart for others


@pytest.fixture
def victim(cramped_victim: Victim) -> Victim:
    return cramped_victim


def holding(victim: Victim) -> dict[str, Any]:
    """A machine that holds more in its memory than will be left on the disk."""
    record = serving(victim, "web", "--memory", "320m", "--tmpfs", "/m:size=200m")
    victim.ok("exec", "web", "dd", "if=/dev/zero", "of=/m/held", "bs=1M", f"count={HELD_MIB}")
    return record


def goes_on(victim: Victim, disk: Disk, record: dict[str, Any], error: dict[str, Any]) -> None:
    assert str(disk.place) in error["message"], error
    await_serving(record)
    assert victim.phase("web") == "running"
    nothing_of_forks(victim, "web")
    disk.free()
    unharmed(victim, record)


def forks(victim: Victim, record: dict[str, Any]) -> None:
    victim.done("POST", "/v1/instances/web/fork", {"name": "twin"})
    await_serving(victim.instance("twin"))
    held = victim.ok("exec", "twin", "ls", "-l", "/m/held").split()
    assert str(HELD_MIB << 20) in held
    unharmed(victim, record)


def sleeps(victim: Victim, record: dict[str, Any]) -> None:
    victim.done("POST", "/v1/instances/web/sleep", {})
    victim.done("POST", "/v1/instances/web/start", {})
    await_serving(record)
    assert str(HELD_MIB << 20) in victim.ok("exec", "web", "ls", "-l", "/m/held").split()


FORK = pytest.param("fork", {"name": "twin"}, forks, id="fork")
SLEEP = pytest.param("sleep", {}, sleeps, id="sleep")


def slow(case: Any) -> Any:
    """The same, not in ordinary runs: each verb is there once."""
    return pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)


@pytest.mark.parametrize(("verb", "body", "works"), [FORK, slow(SLEEP)])
def test_a_disk_that_is_full(victim: Victim, disk: Disk, verb: str, body: Any, works: Any) -> None:
    """It is refused before the machine stands still."""
    record = holding(victim)
    disk.fill(leave_bytes=LEFT_BYTES)
    error = refused(victim, "POST", f"/v1/instances/web/{verb}", body)
    goes_on(victim, disk, record, error)
    works(victim, record)


@pytest.mark.parametrize(("verb", "body", "works"), [slow(FORK), SLEEP])
def test_a_disk_that_fills_meanwhile(victim: Victim, disk: Disk, verb: str, body: Any, works: Any) -> None:
    record = holding(victim)
    with frozen(record["status"]["pid"]):
        operation = victim.ask("POST", f"/v1/instances/web/{verb}", body)
        await_reader(victim, "save", waits=True)
        disk.fill(leave_bytes=LEFT_BYTES)
    ended = victim.outcome(operation)
    assert ended["state"] == "failed"
    assert ended["error"]["code"] == "exhausted", ended["error"]
    goes_on(victim, disk, record, ended["error"])
    until(lambda: victim.phase("web") == "running")
    works(victim, record)
