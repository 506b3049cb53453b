"""The daemon is killed at uniformly random times while users are at work.

What was accepted holds, nothing is doubled or left behind, and what ran before goes on untouched. The seed of a
failure is in its message: ``ALVEOLE_SEED=N`` repeats the choices (not the kernel's timing).
"""

import os
import random
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fault.conftest import MakeVictim, finish
from tests.fault.host import SETTLE_S, Service, Victim, fill
from tests.integration.daemon import until

pytestmark = pytest.mark.root
DELAY_S = 0.4
CHECK_EVERY = 20
ORDINARY_S, ORDINARY_KILLS = 45.0, 25
SLOW_KILLS = int(os.environ.get("ALVEOLE_KILLS", "200"))
KILLED_WHILE_STARTING = 0.2  # of all kills


class Work:
    """What users do, and what they were promised by it: an accepted request holds, an unanswered one may."""

    def __init__(self, victim: Victim, tar: Path, choices: random.Random) -> None:
        self._victim, self._tar, self._random = victim, tar, choices
        boxed = {"work-d": "sandbox"}
        self.services = {
            name: Service(victim, name, boxed.get(name, "container"), "still") for name in map("work-{}".format, "abcd")
        }
        self.promised: dict[str, bool] = {}  # "instances/work-a": whether it is there
        self._executing: list[subprocess.Popen[bytes]] = []

    def once(self) -> None:
        """One request. Raises OSError when the daemon is dead."""
        acts: list[Callable[[], None]] = [self._run, self._run, self._stop, self._remove, self._remove]
        acts += [self._execute, self._volume, self._volume, self._image]
        self._random.choice(acts)()

    def go_on(self) -> None:
        """Until the daemon is dead."""
        try:
            while True:
                self.once()
                time.sleep(self._random.uniform(0, 0.05))
        except OSError:
            return

    def rest(self) -> None:
        for process in self._executing:
            process.wait(timeout=SETTLE_S)
        self._executing.clear()

    def _name(self) -> str:
        return self._random.choice(tuple(self.services))

    def _ask(self, method: str, path: str, body: object = None, *, promise: tuple[str, bool] | None = None) -> None:
        """Refusals (it exists already, it is used) are right answers too."""
        before = self.promised.pop(promise[0], None) if promise else None
        status, _ = self._victim.answer(method, path, body)
        if promise is None:
            return
        if status < 300:
            self.promised[promise[0]] = promise[1]
        elif before is not None:
            self.promised[promise[0]] = before

    def _run(self) -> None:
        name = self._name()
        body = self.services[name].body(restart={"policy": self._random.choice(["no", "always"])})
        self._ask("POST", "/v1/instances", body, promise=(f"instances/{name}", True))

    def _stop(self) -> None:
        self._ask("POST", f"/v1/instances/{self._name()}/stop", {"grace_s": self._random.choice([0, 0.1])})

    def _remove(self) -> None:
        name = self._name()
        self._ask("DELETE", f"/v1/instances/{name}?force=true", promise=(f"instances/{name}", False))

    def _execute(self) -> None:
        argv = self._victim.argv("exec", self._name(), "sleep", "0.1")
        nothing = subprocess.DEVNULL
        self._executing.append(subprocess.Popen(argv, stdin=nothing, stdout=nothing, stderr=nothing))

    def _volume(self) -> None:
        name = self._random.choice(["v", "w"])
        if self._random.random() < 0.5:
            body = {"name": name, "size_bytes": 16 << 20}
            self._ask("POST", "/v1/volumes", body, promise=(f"volumes/{name}", True))
        else:
            self._ask("DELETE", f"/v1/volumes/{name}", promise=(f"volumes/{name}", False))

    def _image(self) -> None:
        if self._random.random() < 0.7:
            self._ask("POST", "/v1/images/import", {"name": "new", "path": str(self._tar), "format": "rootfs"})
        else:
            self._ask("DELETE", "/v1/images/new")


class Trial:
    """A daemon, what runs undisturbed, and the work around it."""

    def __init__(self, victim: Victim, tar: Path, seed: int) -> None:
        self.victim, self.random = victim, random.Random(seed)
        self.work = Work(victim, tar, self.random)
        fill(victim, "still")
        self.standing = [Service(victim, "stands", volume="still"), Service(victim, "boxed", "sandbox", "still")]
        for service in self.standing:
            service.run()
            service.check()
        self.pids = [service.pid for service in self.standing]

    def kill_once(self) -> None:
        """The daemon is alive before, dead after."""
        self.work.once()
        working = threading.Thread(target=self.work.go_on)
        working.start()
        time.sleep(self.random.uniform(0, DELAY_S))
        self.victim.kill9()
        working.join()
        self.work.rest()
        for service in self.standing:
            service.await_answer("127.0.0.1", service.port)
        while self.random.random() < KILLED_WHILE_STARTING:
            self.victim.start_and_kill(self.random.uniform(0.02, 0.8))

    def check(self) -> None:
        """With the daemon alive."""
        victim = self.victim
        victim.settle()
        for service, pid in zip(self.standing, self.pids, strict=True):
            service.check()
            assert service.pid == pid
        for service in self.work.services.values():
            service.await_check()
        names = {f"{kind}/{name}" for kind in ("instances", "volumes") for name in victim.names(kind)}
        for promised, there in self.work.promised.items():
            assert (promised in names) == there, f"{promised} was to be {'there' if there else 'gone'}, not so: {names}"
        self._check_disk()
        faults = victim.new_faults()
        assert not faults, "\n".join(faults)

    def _check_disk(self) -> None:
        """Files and disks are there for exactly what is recorded."""
        victim = self.victim
        instances = {item["id"] for item in victim.items("instances")}
        assert {path.name for path in (victim.state / "instances").iterdir()} == instances
        volumes = {item["id"] for item in victim.items("volumes")}
        assert {path.stem for path in victim.disks()} == volumes
        until(lambda: not any((victim.state / "images/tmp").iterdir()), SETTLE_S, "an empty images/tmp")


@pytest.fixture
def trial(make_victim: MakeVictim, small_tars: list[Path]) -> Iterator[Trial]:
    seed = int(os.environ.get("ALVEOLE_SEED", secrets.randbelow(1 << 32)))
    print(f"ALVEOLE_SEED={seed}")
    victim = make_victim()
    try:
        yield Trial(victim, small_tars[0], seed)
        finish(victim)
    finally:
        victim.destroy()


def kill_many(trial: Trial, enough: Callable[[int], bool]) -> None:
    kills = 0
    while not enough(kills):
        trial.kill_once()
        trial.victim.start()
        kills += 1
        if kills % CHECK_EVERY == 0:
            trial.check()
    trial.check()


@pytest.mark.timeout(240)
def test_killed_at_random_times(trial: Trial) -> None:
    """As many as fit into the time, and no fewer than the least."""
    deadline = time.monotonic() + ORDINARY_S
    kill_many(trial, lambda kills: kills >= ORDINARY_KILLS and time.monotonic() > deadline)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_many_random_times(trial: Trial) -> None:
    kill_many(trial, lambda kills: kills >= SLOW_KILLS)
