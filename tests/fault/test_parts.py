"""What an instance consists of is killed under the daemon, the daemon is stopped, its files are damaged."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.host import SETTLE_S, Service, Victim, fill, is_alive, send
from tests.integration.daemon import until

pytestmark = pytest.mark.root


@pytest.fixture(params=["container", "sandbox"])
def service(victim: Victim, request: pytest.FixtureRequest) -> Iterator[Service]:
    """A service that is started again whenever it ends."""
    fill(victim, "data")
    made = Service(victim, "web", request.param)
    made.run(restart={"policy": "always"})
    yield made
    victim.done("DELETE", "/v1/instances/web?force=true")


def running(service: Service) -> int:
    service.check()
    assert service.pid is not None
    return service.pid


def part(service: Service, program: str) -> int:
    found = service.daemon.processes_of(service.daemon.instance(service.name)["id"])
    return next(pid for pid, name in found.items() if name == program)


def await_another(service: Service, pid: int) -> None:
    """It runs again, once, as a new process."""
    until(lambda: service.pid not in {pid, None}, SETTLE_S, "another process")
    assert not is_alive(pid)
    service.check()


def test_process_killed(service: Service) -> None:
    """By somebody on the host."""
    pid = running(service)
    send(pid, signal.SIGKILL)
    await_another(service, pid)


def test_monitor_killed(service: Service) -> None:
    """Without it nobody keeps its output or exit code: the instance is ended and begins again."""
    pid = running(service)
    send(part(service, "conmon"), signal.SIGKILL)
    await_another(service, pid)


def test_monitor_killed_while_the_daemon_is_dead(service: Service) -> None:
    pid = running(service)
    service.daemon.kill9()
    (monitor,) = [p for p, name in service.daemon.processes_of(_id(service)).items() if name == "conmon"]
    send(monitor, signal.SIGKILL)
    service.daemon.start()
    await_another(service, pid)


def test_process_killed_while_the_daemon_is_dead(service: Service) -> None:
    pid = running(service)
    service.daemon.kill9()
    send(pid, signal.SIGKILL)
    service.daemon.start()
    await_another(service, pid)


def test_daemon_stopped_for_a_while(service: Service) -> None:
    """It serves on, and nothing is done twice when the daemon wakes up."""
    pid = running(service)
    send(service.daemon.pid, signal.SIGSTOP)
    try:
        for _ in range(10):
            service.await_answer("127.0.0.1", service.port)
            time.sleep(0.2)
    finally:
        send(service.daemon.pid, signal.SIGCONT)
    service.check()
    assert service.pid == pid


@pytest.mark.parametrize("text", ["", '{"instance_id": 7}'])
def test_lost_record(victim: Victim, text: str) -> None:
    """As a power cut may leave it: the instance begins again, once, with its files; its network is another."""
    fill(victim, "data")
    service = Service(victim, "web")
    service.run(restart={"policy": "always"})
    service.check()
    victim.ok("exec", "web", "touch", "/mine")
    pid, identifier = running(service), _id(service)
    victim.kill9()
    (victim.state / "instances" / identifier / "local.json").write_text(text)
    victim.start()
    await_another(service, pid)
    victim.ok("exec", "web", "ls", "/mine")


def test_lost_record_of_a_removed_instance(victim: Victim) -> None:
    """Nobody knows any more what it was: nothing of it stays."""
    victim.ok("run", "-d", "--name", "lost", "busybox", "sleep", "600")
    identifier = victim.instance("lost")["id"]
    victim.arm.write_text("remove:files:before")
    with_files = victim.state / "instances" / identifier
    victim.ask("DELETE", "/v1/instances/lost?force=true")
    victim.await_death()
    (with_files / "local.json").write_text("{")
    victim.start()
    until(lambda: not with_files.exists(), SETTLE_S, "its files gone")
    assert not victim.processes_of(identifier)


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_damaged_store(victim: Victim, keep: float) -> None:
    """The daemon refuses in one line, touches nothing, and goes on once the store is put back."""
    service = Service(victim, "web")
    fill(victim, "data")
    service.run()
    pid = running(service)
    victim.stop()
    store = victim.state / "store.db"
    whole = store.read_bytes()
    os.truncate(store, int(len(whole) * keep) // 4096 * 4096)
    began = len(victim.log())
    with pytest.raises(AssertionError, match="the daemon ended"):
        victim.start()
    said = victim.log()[began:].strip().splitlines()
    assert len(said) == 1, said
    assert "store.db" in said[0]
    assert "backup" in said[0]
    assert is_alive(pid)
    store.write_bytes(whole)
    victim.start()
    service.check()
    assert service.pid == pid


def test_store_of_zeros(victim: Victim) -> None:
    """A file system that lost the content of a file: not taken for an empty store, which would end all instances."""
    victim.stop()
    store = victim.state / "store.db"
    whole = store.read_bytes()
    store.write_bytes(bytes(len(whole)))
    with pytest.raises(AssertionError, match=r"store\.db"):
        victim.start()
    store.write_bytes(whole)
    victim.start()


def test_vanished_store_ends_no_instance(victim: Victim) -> None:
    """An empty store in a state directory that holds instances is a mistake to be told, not their end."""
    service = Service(victim, "web")
    fill(victim, "data")
    service.run()
    pid = running(service)
    victim.stop()
    store = victim.state / "store.db"
    away = store.with_name("away")
    store.rename(away)
    with pytest.raises(AssertionError, match=r"store\.db"):
        victim.start()
    assert is_alive(pid)
    away.rename(store)
    victim.start()
    service.check()
    assert service.pid == pid


def _id(service: Service) -> str:
    """From the disk, so that it can be asked when the daemon is dead."""
    records = (service.daemon.state / "instances").glob("*/local.json")
    return next(path.parent.name for path in records if json.loads(path.read_text())["name"] == service.name)


def test_killed_in_the_middle_of_image_work(victim: Victim, tmp_path: Path) -> None:
    """At five moments of an import of 32 MB: the next daemon completes it, with nothing left in between."""
    big = tmp_path / "big"
    big.write_bytes(os.urandom(32 << 20))
    tar = tmp_path / "big.tar"
    subprocess.run(["tar", "-C", tmp_path, "-cf", tar, big.name], check=True)
    for moment in range(5):
        name = f"big{moment}"
        operation = victim.ask("POST", "/v1/images/import", {"name": name, "path": str(tar), "format": "rootfs"})
        time.sleep(moment * 0.08)
        victim.kill9()
        victim.start()
        assert victim.outcome(operation)["state"] == "done"
        until(lambda: not any((victim.state / "images/tmp").iterdir()), SETTLE_S, "an empty images/tmp")
        victim.done("DELETE", f"/v1/images/{name}")


def test_killed_during_a_build(victim: Victim) -> None:
    """While a command of the recipe runs: nothing of that goes on, and the build is done again."""
    files = [{"target": "/bin/busybox", "source": "/bin/busybox", "mode": "0755"}]
    commands = [["/bin/busybox", "sleep", "2"]]
    recipe = {"base": "scratch", "files": files, "commands": commands}
    body = {"name": "built", "directory": "/", "recipe": recipe}
    operation = victim.ask("POST", "/v1/images/build", body)
    until(lambda: _sleepers(victim), SETTLE_S, "the command")
    before = set(_sleepers(victim))
    victim.kill9()
    victim.start()
    until(lambda: not before & set(_sleepers(victim)), SETTLE_S, "the end of the first build")
    assert victim.outcome(operation)["state"] == "done"


def _sleepers(victim: Victim) -> list[int]:
    return [pid for pid in victim.processes() if _argv(pid)[:2] == ["/bin/busybox", "sleep"]]


def _argv(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_two_daemons_at_once(victim: Victim) -> None:
    """Many starts at the same moment after a kill: one wins, the others say so."""
    victim.kill9()
    rivals = [Victim(victim.state, victim.run_dir) for _ in range(3)]
    won: list[Victim] = []

    def contend(rival: Victim) -> None:
        try:
            rival.start()
        except AssertionError:
            return
        won.append(rival)

    threads = [threading.Thread(target=contend, args=(rival,)) for rival in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alive = [rival for rival in won if not rival.ended]
    assert len(alive) == 1
    assert alive[0].stop() == 0
