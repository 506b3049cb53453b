"""How long one start takes, and the steps it is made of."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from tests.perf.alveole import IDLE, IMAGE, Alveole
from tests.perf.docker import Docker
from tests.perf.harness import Report, Row, at_least, at_most, in_turn, ms, timed
from tests.perf.raw import make_bundle, run_once

CRUN = ("crun", "--cgroup-manager=cgroupfs")
RUNSC = ("runsc", "--network=none", "--platform=systrap")
ROUNDS = 20
TOPIC = "Start"


def test_container_beside_crun(alveole: Alveole, report: Report, busybox_image: Path, tmp_path: Path) -> None:
    """With network, through the API, until it runs. Raw: `crun run` of `true` without network, until it has ended."""
    bundle = make_bundle(tmp_path / "bundle", busybox_image, CRUN)
    operations: list[Any] = []
    ours, raw = in_turn(ROUNDS, lambda: _start(alveole, operations), lambda: timed(lambda: run_once(CRUN, bundle)))
    ratio = median(ours) / median(raw)
    what = "container with network, API; beside `crun run true` without"
    report.add(TOPIC, Row(what, ms(ours), ms(raw), f"{ratio:.2f}", at_most(ratio, 3)))
    add_steps(report, "container", operations)


def test_sandbox_beside_runsc(alveole: Alveole, report: Report, busybox_image: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", busybox_image, RUNSC)
    operations: list[Any] = []
    ours, raw = in_turn(
        ROUNDS // 2,
        lambda: _start(alveole, operations, isolation="sandbox"),
        lambda: timed(lambda: run_once(RUNSC, bundle)),
    )
    what = "sandbox with network, API; beside `runsc run true` without"
    report.add(TOPIC, Row(what, ms(ours), ms(raw), f"{median(ours) / median(raw):.2f}"))
    add_steps(report, "sandbox", operations)


def test_api_beside_docker(alveole: Alveole, docker: Docker, report: Report) -> None:
    operations: list[Any] = []

    def docker_start() -> float:
        made: list[str] = []
        seconds = timed(lambda: made.append(docker.start_by_api(*IDLE)))
        docker.api("DELETE", f"/containers/{made[0]}?force=true")
        return seconds

    _compare(
        report, "container with network, API socket; beside Docker's", lambda: _start(alveole, operations), docker_start
    )


def test_command_line_beside_docker(alveole: Alveole, docker: Docker, report: Report) -> None:
    def ours() -> float:
        seconds, name = _timed_output(lambda: alveole.cli("run", "-d", IMAGE, *IDLE))
        alveole.cli("rm", "-f", name)
        return seconds

    def theirs() -> float:
        seconds, name = _timed_output(lambda: docker.cli("run", "-d", IMAGE, *IDLE))
        docker.cli("rm", "-f", name)
        return seconds

    _compare(report, "`alveole run -d`; beside `docker run -d`", ours, theirs)


def _compare(report: Report, what: str, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    mine, other = in_turn(ROUNDS // 2, ours, theirs)
    ratio = median(other) / median(mine)
    report.add(TOPIC, Row(what, ms(mine), ms(other), f"{ratio:.1f} × faster", at_least(ratio, 8)))


def _timed_output(action: Callable[[], str]) -> tuple[float, str]:
    outputs: list[str] = []
    return timed(lambda: outputs.append(action())), outputs[0]


def test_eight_at_a_time(alveole: Alveole, docker: Docker, report: Report) -> None:
    """Starts a second when eight clients ask at once."""
    ours, theirs = in_turn(
        3,
        lambda: _at_once(lambda: alveole.start_by_api(*IDLE), alveole.remove),
        lambda: _at_once(
            lambda: docker.start_by_api(*IDLE), lambda made: docker.api("DELETE", f"/containers/{made}?force=true")
        ),
    )
    rates = [1 / median(times) for times in (ours, theirs)]
    ratio = rates[0] / rates[1]
    what = "eight containers at a time, API socket"
    report.add(TOPIC, Row(what, f"{rates[0]:.1f} a second", f"{rates[1]:.1f} a second", f"{ratio:.1f} × faster"))


def _at_once(start: Callable[[], Any], remove: Callable[[Any], Any]) -> float:
    """Seconds for each of 40 starts."""
    count = 40
    made: list[Any] = []
    with ThreadPoolExecutor(8) as clients:
        seconds = timed(lambda: made.extend(clients.map(lambda _: start(), range(count))))
        list(clients.map(remove, made))
    return seconds / count


def _start(alveole: Alveole, operations: list[Any], **spec: Any) -> float:
    seconds = timed(lambda: operations.append(alveole.start_by_api(*IDLE, **spec)))
    alveole.remove(operations[-1])
    return seconds


def add_steps(report: Report, isolation: str, operations: Sequence[Any]) -> None:
    """Where a start spends its time, as its operation records it."""
    found: dict[str, list[float]] = {}
    for operation in operations[1:]:
        found.setdefault("before the node begins", []).append(_before(operation))
        for step in operation["steps"]:
            found.setdefault(step["name"], []).append(step["duration_ms"] / 1000)
        found.setdefault("after its process started", []).append(_after(operation))
    for name, seconds in found.items():
        report.add("Steps of a start", Row(f"{isolation}: {name}", ms(seconds)))


def _before(operation: Any) -> float:
    return (_time(operation["steps"][0]["started_at"]) - _time(operation["created_at"])).total_seconds()


def _after(operation: Any) -> float:
    last = operation["steps"][-1]
    elapsed = _time(operation["finished_at"]) - _time(last["started_at"])
    return elapsed.total_seconds() - float(last["duration_ms"]) / 1000


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
