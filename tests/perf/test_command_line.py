"""How long the command line takes, its own start included."""

from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from tests.perf.alveole import IMAGE, Alveole
from tests.perf.docker import Docker
from tests.perf.harness import Report, Row, at_most, in_turn, ms, timed

COUNT = 1000
ROUNDS = 10
TOPIC = "Command line"


def test_version(alveole: Alveole, docker: Docker, report: Report) -> None:
    ours, theirs = in_turn(
        ROUNDS, lambda: timed(lambda: alveole.cli("version")), lambda: timed(lambda: docker.cli("version"))
    )
    figure = median(ours) * 1000
    what = "`alveole version`, the daemon asked too; beside `docker version`"
    report.add(
        TOPIC, Row(what, ms(ours), ms(theirs), f"{median(ours) / median(theirs):.2f}", at_most(figure, 100, "ms"))
    )


def test_list_of_a_thousand(alveole: Alveole, report: Report) -> None:
    body = {"start": False, "spec": {"image": IMAGE, "command": ["true"], "network": "none"}}
    made: list[Any] = []
    with ThreadPoolExecutor(8) as clients:
        seconds = timed(
            lambda: made.extend(clients.map(lambda _: alveole.done("POST", "instances", body), range(COUNT)))
        )
    report.add(TOPIC, Row(f"{COUNT:,} instances created, not started", f"{COUNT / seconds:.0f} a second"))
    assert len(alveole.cli("ls", "--quiet").splitlines()) == COUNT
    (times,) = in_turn(ROUNDS, lambda: timed(lambda: alveole.cli("ls")))
    figure = median(times) * 1000
    report.add(TOPIC, Row(f"`alveole ls` of {COUNT:,}", ms(times), promise=at_most(figure, 150, "ms")))
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(alveole.remove, made))
