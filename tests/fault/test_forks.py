"""Who takes part in a fork, or goes to sleep, is killed, stands still or changes its mind, at moments held fast.

The other one is unharmed, there is one clear error, and nothing is left of what was begun.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fault.conftest import MakeVictim, finish
from tests.fault.frozen import (
    LONG_S,
    await_machine,
    await_reader,
    await_serving,
    frozen,
    nothing_of_forks,
    serving,
    unharmed,
)
from tests.fault.host import SETTLE_S, Victim, as_guest_root, reachable, send
from tests.integration.daemon import until

pytestmark = pytest.mark.root
TWIN = {"name": "twin"}
ALWAYS = ("--restart", "always")
AT_ONCE = 8
MANY = int(os.environ.get("ALVEOLE_FORKS", "200"))
EACH_BYTES = 100 << 20  # of memory, for a fork of an idle machine of 128 MiB
MANY_S = 1200.0


@pytest.fixture(scope="module")
def shared(make_victim: MakeVictim) -> Iterator[Victim]:
    made = make_victim()
    try:
        yield made
        finish(made)
    finally:
        made.destroy()


@pytest.fixture
def victim(shared: Victim) -> Iterator[Victim]:
    yield shared
    if shared.ended:
        shared.start()
    shared.clear()
    nothing_of_forks(shared)


@contextmanager
def captured(victim: Victim, record: dict[str, Any], verb: str, body: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """(operation, process that saves pages): the machine stands still, and its pages are about to be read."""
    pid = record["status"]["pid"]
    with frozen(pid):
        operation = victim.ask("POST", f"/v1/instances/{record['name']}/{verb}", body)
        reader = await_reader(victim, "save", waits=True)
        os.kill(reader, signal.SIGSTOP)
    with frozen(reader):
        until(lambda: not reachable(record["address"], 80), SETTLE_S, "a machine that stands still")
        yield operation, reader


def failed(victim: Victim, operation: dict[str, Any], words: str) -> None:
    ended = victim.outcome(operation)
    assert ended["state"] == "failed", ended
    assert words in ended["error"]["message"], ended["error"]


@pytest.mark.parametrize(("verb", "body"), [("fork", TWIN), ("sleep", {})])
def test_one_that_dies_before_it_is_captured(victim: Victim, verb: str, body: Any) -> None:
    record = serving(victim, "web")
    with frozen(record["status"]["pid"]):
        operation = victim.ask("POST", f"/v1/instances/web/{verb}", body)
        await_reader(victim, "save", waits=True)
        send(record["status"]["pid"], signal.SIGKILL)
    failed(victim, operation, "the machine ended while it was captured")
    assert victim.wait_phase("web", "exited")["status"]["reason"] == "killed by SIGKILL"
    nothing_of_forks(victim, "web")


@pytest.mark.parametrize(("verb", "body"), [("fork", TWIN), ("sleep", {})])
def test_one_that_dies_while_its_pages_are_read(victim: Victim, verb: str, body: Any) -> None:
    record = serving(victim, "web")
    with captured(victim, record, verb, body) as (operation, _):
        send(record["status"]["pid"], signal.SIGKILL)
    failed(victim, operation, "the machine ended while it was captured")
    assert victim.wait_phase("web", "exited")["status"]["reason"] == "killed by SIGKILL"
    nothing_of_forks(victim, "web")
    victim.ok("start", "web")
    await_serving(record)


@pytest.mark.parametrize(("verb", "body"), [("fork", TWIN), ("sleep", {})])
def test_a_reader_that_is_killed(victim: Victim, verb: str, body: Any) -> None:
    record = serving(victim, "web")
    with captured(victim, record, verb, body) as (operation, reader):
        send(reader, signal.SIGKILL)
    failed(victim, operation, "the memory of the machine could not be saved")
    unharmed(victim, record)
    nothing_of_forks(victim, "web")


def test_a_fork_that_is_cancelled_while_its_original_stands_still(victim: Victim) -> None:
    record = serving(victim, "web")
    with captured(victim, record, "fork", TWIN) as (operation, _):
        assert victim.api("POST", f"/v1/operations/{operation['id']}/cancel")[0] == 202
        until(lambda: reachable(record["address"], 80), SETTLE_S, "the original goes on")
    assert victim.outcome(operation)["state"] == "cancelled"
    unharmed(victim, record)
    nothing_of_forks(victim, "web")


@pytest.mark.parametrize(("verb", "body"), [("fork", TWIN), ("sleep", {})])
def test_a_daemon_that_dies_while_a_machine_stands_still(victim: Victim, verb: str, body: Any) -> None:
    """The next one lets it go on, and does what was asked."""
    record = serving(victim, "web")
    with captured(victim, record, verb, body) as (operation, _):
        victim.kill9()
    victim.start()
    assert victim.outcome(operation)["state"] == "done"
    if verb == "sleep":
        victim.done("POST", "/v1/instances/web/start", {})
        await_serving(record)
        return
    unharmed(victim, record)
    await_serving(victim.instance("twin"))


@pytest.mark.slow
def test_an_original_that_does_not_answer(victim: Victim) -> None:
    """It is not made to stand still later, when nobody would let it go on."""
    record = serving(victim, "web")
    with frozen(record["status"]["pid"]):
        operation = victim.ask("POST", "/v1/instances/web/fork", TWIN)
        until(lambda: victim.api("GET", f"/v1/operations/{operation['id']}")[1]["state"] != "running", LONG_S)
    failed(victim, operation, "QEMU does not answer")
    unharmed(victim, record)
    nothing_of_forks(victim, "web")


@pytest.mark.parametrize("options", [(), ALWAYS], ids=["never", "always"])
def test_a_fork_that_dies_as_it_begins(victim: Victim, options: tuple[str, ...]) -> None:
    """Whether it is to run always or not, what never began is not there."""
    record = serving(victim, "web", *options)
    operation = victim.ask("POST", "/v1/instances/web/fork", TWIN)
    send(await_machine(victim, operation["result"]["id"]), signal.SIGKILL)
    failed(victim, operation, "the machine ended before it had taken in what it was to go on from")
    unharmed(victim, record)
    nothing_of_forks(victim, "web")


def test_a_fork_that_dies_while_pages_are_put_into_it(victim: Victim) -> None:
    record = serving(victim, "web")
    operation = victim.ask("POST", "/v1/instances/web/fork", TWIN)
    pid = await_machine(victim, operation["result"]["id"])
    with frozen(await_reader(victim, "load")):
        send(pid, signal.SIGKILL)
    failed(victim, operation, "the machine ended before it had taken in what it was to go on from")
    unharmed(victim, record)
    nothing_of_forks(victim, "web")


def test_one_that_dies_while_it_wakes(victim: Victim) -> None:
    """What it was is still there: it can be woken."""
    record = serving(victim, "web")
    victim.ok("exec", "web", "busybox", "sh", "-c", "echo kept > /dev/shm/word")
    victim.done("POST", "/v1/instances/web/sleep", {})
    operation = victim.ask("POST", "/v1/instances/web/start", {})
    send(await_machine(victim, record["id"]), signal.SIGKILL)
    failed(victim, operation, "the machine ended before it had taken in what it was to go on from")
    victim.done("POST", "/v1/instances/web/start", {})
    await_serving(record)
    assert victim.ok("exec", "web", "cat", "/dev/shm/word") == "kept"
    nothing_of_forks(victim, "web")


@pytest.mark.slow
def test_one_that_is_not_ready_when_it_has_woken_boots_the_next_time(victim: Victim) -> None:
    """It has written to its disk meanwhile: what was kept of its memory does not fit that any more."""
    record = serving(victim, "web")
    victim.ok("exec", "web", "busybox", "sh", "-c", "echo kept > /dev/shm/word")
    victim.ok("exec", "web", "busybox", "sh", "-c", "(sleep 15; echo later > /later; sync) >/dev/null 2>&1 &")
    as_guest_root(victim, record, "killall -STOP cat")  # what its init says goes nowhere any more
    victim.done("POST", "/v1/instances/web/sleep", {})
    operation = victim.ask("POST", "/v1/instances/web/start", {})
    until(lambda: victim.api("GET", f"/v1/operations/{operation['id']}")[1]["state"] != "running", 3 * LONG_S)
    failed(victim, operation, "was not ready within")
    victim.done("POST", "/v1/instances/web/start", {})
    await_serving(record)
    assert victim.ok("exec", "web", "cat", "/later") == "later"
    assert not victim.ok("exec", "web", "ls", "/dev/shm")


def test_a_fork_that_dies_later_begins_again_as_its_policy_says(victim: Victim) -> None:
    """From its own disk."""
    record = serving(victim, "web", *ALWAYS)
    victim.done("POST", "/v1/instances/web/fork", TWIN)
    victim.ok("exec", "twin", "busybox", "sh", "-c", "echo its own > /f; sync")
    pid = victim.instance("twin")["status"]["pid"]
    send(pid, signal.SIGKILL)
    until(lambda: victim.instance("twin")["status"].get("pid") not in {pid, None}, LONG_S, "another machine")
    until(lambda: victim.phase("twin") == "running", LONG_S, "it runs")
    assert victim.ok("exec", "twin", "cat", "/f") == "its own"
    assert victim.instance("twin")["status"]["restarts"] == 1
    unharmed(victim, record)


def fork_at_once(victim: Victim, count: int) -> list[dict[str, Any]]:
    """Forks of one moment, and the instances they have become."""
    first = victim.ask("POST", "/v1/instances/web/fork", {"name": "copy-1"})
    moment = first["result"]["moment"]
    bodies = [{"name": f"copy-{number}", "moment": moment} for number in range(2, count + 1)]
    with ThreadPoolExecutor(AT_ONCE) as clients:
        others = list(clients.map(lambda body: victim.ask("POST", "/v1/instances/web/fork", body), bodies))
    for operation in (first, *others):
        path = f"/v1/operations/{operation['id']}"
        until(lambda path=path: victim.api("GET", path)[1]["state"] != "running", MANY_S, path)  # type: ignore[misc]
        ended = victim.api("GET", path)[1]
        assert ended["state"] == "done", ended["error"]
    return [item for item in victim.items("instances") if item["name"] != "web"]


def each_by_itself(victim: Victim, record: dict[str, Any], copies: list[dict[str, Any]]) -> None:
    assert {copy["status"]["phase"] for copy in copies} == {"running"}
    assert len({copy["address"] for copy in (*copies, record)}) == len(copies) + 1
    assert len({copy["origin"]["moment"] for copy in copies}) == 1
    for copy in copies:
        await_serving(copy)
    unharmed(victim, record)


def test_many_forks_at_once(victim: Victim) -> None:
    record = serving(victim, "web")
    copies = fork_at_once(victim, AT_ONCE)
    assert len(copies) == AT_ONCE
    each_by_itself(victim, record, copies)
    hosts = {victim.ok("exec", copy["name"], "cat", "/etc/hostname") for copy in copies}
    assert hosts == {copy["name"] for copy in copies}


@pytest.mark.slow
@pytest.mark.timeout(2 * MANY_S)
def test_very_many_forks_at_once(victim: Victim) -> None:
    """As many as this host has memory for."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    count = min(MANY, available * 8 // 10 // EACH_BYTES)
    print(f"{count} forks of one moment")
    record = serving(victim, "web")
    copies = fork_at_once(victim, count)
    assert len(copies) == count
    each_by_itself(victim, record, copies)
    victim.ok("rm", "-f", *(copy["name"] for copy in copies), timeout=MANY_S)
    nothing_of_forks(victim, "web")
