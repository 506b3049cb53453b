"""What a machine consists of is killed, panics, or does not listen; the daemon dies while a template is made."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fault.conftest import MakeVictim, finish
from tests.fault.host import SETTLE_S, Service, Victim, as_guest_root, fill, is_alive, send, warm
from tests.integration.daemon import until

pytestmark = pytest.mark.root
LONG_S = 60.0  # a template is made meanwhile
FOREVER = ("busybox", "sleep", "600")


@pytest.fixture(scope="module")
def shared(make_victim: MakeVictim) -> Iterator[Victim]:
    """One that has its template."""
    made = make_victim()
    try:
        warm(made)
        yield made
        finish(made)
        assert not made.run_dir.exists()
    finally:
        made.destroy()


@pytest.fixture
def victim(shared: Victim) -> Iterator[Victim]:
    if shared.ended:
        shared.start()
    yield shared
    if shared.ended:
        shared.start()
    shared.clear()
    until(lambda: not machines(shared), SETTLE_S, "no machine")


def machines(victim: Victim) -> list[str]:
    """Processes that are there because of machines."""
    found = []
    for pid in victim.processes():
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name in {"qemu-system-x86", "conmon", "ssh"}:
            found.append(name)
    return found


def run(victim: Victim, name: str, *options: str, command: tuple[str, ...] = FOREVER) -> dict[str, Any]:
    victim.ok("run", "-d", "--isolation", "vm", "--name", name, *options, *command, timeout=LONG_S)
    return victim.instance(name)


def reason(victim: Victim, name: str) -> tuple[int | None, str]:
    """(exit code, reason) once it has ended."""
    status = victim.wait_phase(name, "exited")["status"]
    return status.get("exit_code"), status["reason"]


def test_a_killed_machine_says_by_what(victim: Victim) -> None:
    record = run(victim, "it")
    send(record["status"]["pid"], signal.SIGKILL)
    assert reason(victim, "it") == (137, "killed by SIGKILL")
    assert not victim.processes_of(record["id"])


def test_a_command_in_a_killed_machine_ends_with_it(victim: Victim) -> None:
    """Though nobody is left in the guest who could close its connection."""
    record = run(victim, "it")
    with subprocess.Popen(victim.argv("exec", "it", *FOREVER), stdin=subprocess.DEVNULL) as client:
        until(lambda: "ssh" in machines(victim), SETTLE_S, "the command")
        send(record["status"]["pid"], signal.SIGKILL)
        assert client.wait(timeout=SETTLE_S) != 0
    assert "ssh" not in machines(victim)


def test_a_command_in_a_machine_ends_with_its_daemon(victim: Victim) -> None:
    record = run(victim, "it")
    with subprocess.Popen(
        victim.argv("exec", "it", *FOREVER), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as client:
        until(lambda: "ssh" in machines(victim), SETTLE_S, "the command")
        victim.kill9()
        assert client.wait(timeout=SETTLE_S) != 0
    until(lambda: "ssh" not in machines(victim), SETTLE_S, "no command")
    assert is_alive(record["status"]["pid"])


def test_requests_that_waited_for_a_machine_that_stood_still_are_each_obeyed(victim: Victim) -> None:
    """They reach its guest in one piece."""
    pid = run(victim, "it")["status"]["pid"]
    send(pid, signal.SIGSTOP)
    try:
        argv = victim.argv("exec", "it", "busybox", "echo", "done")
        clients = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        time.sleep(2.0)  # for them to ask; a machine that stands still tells nobody that it was asked
    finally:
        send(pid, signal.SIGCONT)
    assert [client.communicate(timeout=LONG_S)[0] for client in clients] == ["done\n"] * 4


def test_a_panic_of_the_guests_kernel_is_named(victim: Victim) -> None:
    record = run(victim, "it")
    as_guest_root(victim, record, "sleep 0.1; echo c >/proc/sysrq-trigger")
    code, why = reason(victim, "it")
    assert why == "guest kernel panicked"
    assert code != 0
    assert not victim.processes_of(record["id"])


def test_a_guest_that_switches_itself_off_is_named(victim: Victim) -> None:
    record = run(victim, "it")
    as_guest_root(victim, record, "sleep 0.1; poweroff -f")
    assert reason(victim, "it") == (0, "powered off")


@pytest.mark.parametrize("end", ["killed", pytest.param("panicked", marks=pytest.mark.slow)])
def test_one_that_is_to_run_always_begins_again(victim: Victim, end: str) -> None:
    """What it had written and flushed is there."""
    record = run(victim, "it", "--restart", "always")
    victim.ok("exec", "it", "busybox", "sh", "-c", "echo kept >/file; sync")
    pid = record["status"]["pid"]
    if end == "killed":
        send(pid, signal.SIGKILL)
    else:
        as_guest_root(victim, record, "sleep 0.1; echo c >/proc/sysrq-trigger")
    until(lambda: victim.instance("it")["status"].get("pid") not in {pid, None}, SETTLE_S, "another machine")
    until(lambda: victim.phase("it") == "running", SETTLE_S, "it runs")
    assert victim.ok("exec", "it", "cat", "/file") == "kept"
    assert victim.instance("it")["status"]["restarts"] == 1
    assert machines(victim).count("qemu-system-x86") == 1


def test_a_guest_that_does_not_listen_is_ended(victim: Victim) -> None:
    """Neither its init nor the instance does anything any more: it is gone after its grace, and the moment that any
    guest is given to write what it holds."""
    record = run(victim, "it")
    as_guest_root(victim, record, "sleep 0.1; kill -STOP -1")
    time.sleep(0.5)
    victim.done("POST", "/v1/instances/it/stop", {"grace_s": 0.2})
    assert reason(victim, "it")[0] == 137
    assert not victim.processes_of(record["id"])


def test_a_machine_outlives_its_daemon_and_is_taken_over(victim: Victim) -> None:
    fill(victim, "data")
    service = Service(victim, "web", "vm")
    service.run()
    service.check()
    pid = service.pid
    victim.kill9()
    service.await_answer("127.0.0.1", service.port)
    victim.start()
    service.check()
    assert service.pid == pid
    assert victim.ok("exec", "web", "cat", "/d/kept") == "kept"
    victim.ok("stop", "-t", "0", "web")
    assert victim.instance("web")["status"]["exit_code"] == 137


def test_one_that_ended_while_no_daemon_was_there(victim: Victim) -> None:
    record = run(victim, "it", command=("busybox", "sh", "-c", "while ! test -e /go; do sleep 0.05; done; exit 9"))
    victim.ok("exec", "it", "busybox", "sh", "-c", "(sleep 1; touch /go) >/dev/null 2>&1 &")
    victim.kill9()
    until(lambda: not is_alive(record["status"]["pid"]), SETTLE_S, "its end")
    victim.start()
    assert reason(victim, "it") == (9, "exited")


def test_a_daemon_killed_while_it_makes_a_template_cleans_up_when_it_starts(victim: Victim) -> None:
    """And then makes it."""
    body = {
        "name": "it",
        "spec": {
            "image": "busybox",
            "isolation": "vm",
            "command": list(FOREVER),
            "resources": {"memory_bytes": 140 << 20},
        },
    }
    operation = victim.ask("POST", "/v1/instances", body)
    place = victim.run_dir / "t"
    until(lambda: list(place.glob("*/m/qmp/socket")), SETTLE_S, "a machine that becomes a template")
    victim.kill9()
    victim.start()
    until(lambda: victim.phase("it") == "running", LONG_S, "it runs")
    assert victim.outcome(operation)["state"] == "done"
    assert machines(victim).count("qemu-system-x86") == 1
    assert not list(place.glob("*"))
    assert not list((victim.state / "qemu/templates").glob("*.*"))


def test_a_daemon_killed_while_it_makes_a_template_afresh_does_so_when_it_starts(victim: Victim) -> None:
    """Who goes on from the old one notices nothing."""
    record = run(victim, "it")
    (before,) = (one for one in victim.items("templates") if one["key"] == record["status"]["machine"]["template"])
    operation = victim.ask("POST", f"/v1/templates/{before['key']}/refresh", {})
    place = victim.run_dir / "t"
    until(lambda: list(place.glob("*/m/qmp/socket")), LONG_S, "a machine that becomes a template")
    victim.kill9()
    victim.start()
    path = f"/v1/operations/{operation['id']}"
    until(lambda: victim.api("GET", path)[1]["state"] != "running", LONG_S, "its end")
    assert victim.outcome(operation)["state"] == "done"
    (after,) = (one for one in victim.items("templates") if one["key"] == before["key"])
    assert (after["cause"], after["instances"]) == ("refreshed", 0)
    assert after["created_at"] > before["created_at"]
    assert machines(victim).count("qemu-system-x86") == 1
    assert victim.instance("it")["status"]["pid"] == record["status"]["pid"]
    assert not list(place.glob("*"))
    assert not list((victim.state / "qemu/templates").glob("*.*"))
