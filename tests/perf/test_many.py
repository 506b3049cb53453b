"""What many containers on one host cost: the 200th start, memory, removal."""

from statistics import median
from typing import Any

from tests.perf.alveole import IDLE, Alveole
from tests.perf.docker import Docker
from tests.perf.harness import Report, Row, at_most, ms, pss_bytes, timed

COUNT = 200
DOCKER_COUNT = 20  # its memory grows with each alike; 200 would take minutes
EDGE = 10  # starts that count as "the first" and "the last"
TOPIC = "Many"


def test_idle_containers(alveole: Alveole, report: Report) -> None:
    before = pss_bytes(alveole.resident())
    made: list[Any] = []
    seconds = [timed(lambda: made.append(alveole.start_by_api(*IDLE))) for _ in range(COUNT)]
    ratio = median(seconds[-EDGE:]) / median(seconds[:EDGE])
    what = f"start of the last {EDGE} of {COUNT} containers; beside the first {EDGE}"
    last, first = ms(seconds[-EDGE:]), ms(seconds[:EDGE])
    report.add(TOPIC, Row(what, last, first, f"{ratio:.2f}", at_most(ratio, 1.3)))
    report.add(TOPIC, Row(f"{COUNT} starts one after the other", f"{COUNT / sum(seconds):.1f} a second"))

    monitors, grown = alveole.monitors(), pss_bytes(alveole.resident()) - before
    assert len(monitors) == COUNT
    _report_memory(report, monitors=pss_bytes(monitors) / COUNT, grown=grown / COUNT)

    removal = [timed(lambda operation=operation: alveole.remove(operation)) for operation in made]  # type: ignore[misc]
    report.add(TOPIC, Row(f"{COUNT} forced removals one after the other", f"{COUNT / sum(removal):.1f} a second"))


def _report_memory(report: Report, *, monitors: float, grown: float) -> None:
    each = (monitors + grown) / 1e6
    parts = f"{each:.2f} MB (monitor {monitors / 1e6:.2f}, daemon {grown / 1e6:.2f})"
    report.add(TOPIC, Row("memory (PSS) of each beyond its own processes", parts, promise=at_most(each, 1.5, "MB")))


def test_memory_beside_docker(docker: Docker, report: Report) -> None:
    before = _docker_bytes(docker)
    made = [docker.start_by_api(*IDLE) for _ in range(DOCKER_COUNT)]
    each = (_docker_bytes(docker) - before) / DOCKER_COUNT / 1e6
    assert len(docker.processes()["containerd-shim-runc-v2"]) == DOCKER_COUNT
    report.add(TOPIC, Row(f"the same of each of {DOCKER_COUNT} containers of Docker", "", f"{each:.2f} MB"))
    for container in made:
        docker.api("DELETE", f"/containers/{container}?force=true")


def _docker_bytes(docker: Docker) -> int:
    return pss_bytes([pid for pids in docker.processes().values() for pid in pids])
