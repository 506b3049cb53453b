"""Machines: how long they take to boot and to go on from a template, what they use, how soon a command runs in them."""

import http.client
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from alveole.runtime.qemu.boot import find_kernel
from tests.integration.daemon import until
from tests.perf.alveole import IDLE, Alveole
from tests.perf.harness import Report, Row, in_turn, ms, timed
from tests.perf.raw import MACHINE_MIB, boot_once
from tests.perf.test_start import add_steps

TOPIC = "Machines"
MACHINE: dict[str, Any] = {"isolation": "vm", "resources": {"memory_bytes": MACHINE_MIB << 20}}
SERVER = ("httpd", "-f", "-p", "80")
WORK = "head -c 16m /dev/zero | md5sum"
BOOTS, CLONES, COMMANDS, SIDE_BY_SIDE = 4, 12, 10, 4
ANSWER_S = 60.0


@pytest.fixture(scope="module")
def template(alveole: Alveole) -> dict[str, Any]:
    """What is told of a machine of MACHINE's shape. Its template is there, and so is its image's disk."""
    first = alveole.start_by_api(*IDLE, **MACHINE)
    told: dict[str, Any] = alveole.api("GET", f"instances/{first['result']['id']}")["status"]["machine"]
    alveole.remove(first)
    return told


def test_boot_beside_qemu_by_hand(alveole: Alveole, report: Report, template: dict[str, Any], tmp_path: Path) -> None:
    """Ours: until the instance's process runs. By hand: until the guest's first process waits to be told what to be."""
    kernel = find_kernel()
    (initramfs,) = (alveole.daemon.state / "qemu").glob("initramfs-*")
    used: list[int] = []

    def by_hand() -> float:
        seconds, pss = boot_once(kernel.image, initramfs, tmp_path, accelerator=template["accelerator"])
        used.append(pss)
        return seconds

    operations: list[Any] = []
    ours, raw = in_turn(BOOTS, lambda: _start(alveole, operations, template=False), by_hand)
    what = f"vm that boots, {template['accelerator']}, until its process runs; beside QEMU by hand until its first word"
    report.add(TOPIC, Row(what, ms(ours), ms(raw), f"{median(ours) / median(raw):.2f}"))
    add_steps(report, "vm that boots", operations)
    report.add(TOPIC, Row("memory (PSS) of QEMU by hand, booted", "", f"{median(used) / 1e6:.0f} MB"))


def test_clone_beside_its_boot(alveole: Alveole, report: Report, template: dict[str, Any]) -> None:
    """Most ordinary starts are these."""
    assert template["template"]
    operations: list[Any] = []
    (clones,) = in_turn(CLONES, lambda: _start(alveole, operations))
    ordered = sorted(clones)
    longest = f"longest of {CLONES} {ordered[-1] * 1000:.0f} ms"
    report.add(TOPIC, Row("vm from its template, until its process runs", f"{ms(clones)}, {longest}"))
    add_steps(report, "vm from a template", operations)


def test_first_answer(alveole: Alveole, report: Report, template: dict[str, Any]) -> None:
    """From the request to run it until its HTTP server has answered."""
    clone, boot = in_turn(BOOTS, lambda: _answer(alveole), lambda: _answer(alveole, template=False))
    ratio = f"{median(clone) / median(boot):.2f}"
    report.add(TOPIC, Row("first answer of a vm from its template; beside one that boots", ms(clone), ms(boot), ratio))


def test_memory(alveole: Alveole, report: Report, template: dict[str, Any]) -> None:
    booted = _memory(alveole, 1, template=False)
    alone, shared = _memory(alveole, 1), _memory(alveole, SIDE_BY_SIDE)
    ours = f"{shared / 1e6:.0f} MB each (a single one {alone / 1e6:.0f} MB)"
    what = f"memory (PSS) of {SIDE_BY_SIDE} idle vms of {MACHINE_MIB} MiB from one template; beside one that booted"
    report.add(TOPIC, Row(what, ours, f"{booted / 1e6:.0f} MB", f"{shared / booted:.2f}"))


def test_command_in_a_machine(alveole: Alveole, report: Report, template: dict[str, Any]) -> None:
    machine, container = alveole.start_by_api(*IDLE, **MACHINE), alveole.start_by_api(*IDLE)
    inside, beside = in_turn(COMMANDS, _executed(alveole, machine, "true"), _executed(alveole, container, "true"))
    ratio = f"{median(inside) / median(beside):.1f}"
    report.add(TOPIC, Row("`alveole exec` of `true` in a vm; beside in a container", ms(inside), ms(beside), ratio))
    work = ("sh", "-c", WORK)
    inside_s, beside_s = in_turn(BOOTS, _executed(alveole, machine, *work), _executed(alveole, container, *work))
    computing, beside_it = median(inside_s) - median(inside), median(beside_s) - median(beside)
    what = f"a computation (`{WORK.replace(' | ', ' to ')}`), exec taken off; beside in a container"
    report.add(TOPIC, Row(what, ms([computing]), ms([beside_it]), f"{computing / beside_it:.1f}"))
    for operation in (machine, container):
        alveole.remove(operation)


def _executed(alveole: Alveole, operation: Any, *words: str) -> Callable[[], float]:
    return lambda: timed(lambda: alveole.cli("exec", operation["result"]["id"], *words))


def _start(alveole: Alveole, operations: list[Any], **spec: Any) -> float:
    seconds = timed(lambda: operations.append(alveole.start_by_api(*IDLE, **MACHINE, **spec)))
    alveole.remove(operations[-1])
    return seconds


def _answer(alveole: Alveole, **spec: Any) -> float:
    made: list[Any] = []

    def until_it_answers() -> None:
        made.append(alveole.start_by_api(*SERVER, **MACHINE, **spec))
        address = alveole.api("GET", f"instances/{made[0]['result']['id']}")["address"]
        until(lambda: _answers(address), ANSWER_S, "its answer")

    seconds = timed(until_it_answers)
    alveole.remove(made[0])
    return seconds


def _answers(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=ANSWER_S)
    with suppress(ConnectionRefusedError):
        connection.request("GET", "/")
        return re.match("[234]", str(connection.getresponse().status)) is not None
    return False


def _memory(alveole: Alveole, count: int, **spec: Any) -> float:
    """Bytes of each."""
    made = [alveole.start_by_api(*IDLE, **MACHINE, **spec) for _ in range(count)]
    used = [int(alveole.api("GET", f"instances/{operation['result']['id']}/stats")["pss_bytes"]) for operation in made]
    for operation in made:
        alveole.remove(operation)
    return sum(used) / count
