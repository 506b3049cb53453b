"""Forks, sleep and wake: how long the original stands still, until the fork runs, and what many forks use."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from alveole.runtime.qemu.boot import find_kernel
from tests.integration.daemon import until
from tests.perf.alveole import IDLE, Alveole
from tests.perf.harness import Report, Row, at_most, in_turn, p50_p99, timed
from tests.perf.raw_fork import by_hand

TOPIC = "Forks"
HELD_MIB = 50
ROUNDS = {256: 30, 1024: 10, 4096: 5}  # by the machine's MiB of memory
GENERATIONS, OF_EACH = 3, 10
COPIES = 20
_COPIES_S = 300.0
_PING_S = 0.002
HOLD = ("sh", "-c", f"tr '\\0' x < /dev/zero | head -c {HELD_MIB}m > /dev/shm/held")


def spec(memory_mib: int) -> dict[str, Any]:
    return {"isolation": "vm", "resources": {"memory_bytes": memory_mib << 20}}


def identifier(operation: Any) -> str:
    return str(operation["result"]["id"])


def holding(alveole: Alveole, memory_mib: int) -> Any:
    """An original that has written so much of its memory."""
    made = alveole.start_by_api(*IDLE, **spec(memory_mib))
    alveole.cli("exec", identifier(made), *HOLD)
    return made


def fork(alveole: Alveole, original: Any) -> Any:
    return alveole.done("POST", f"instances/{identifier(original)}/fork", {})


def capture_s(operation: Any) -> float:
    return float(next(step["duration_ms"] for step in operation["steps"] if step["name"] == "capture")) / 1000


def address(alveole: Alveole, operation: Any) -> str:
    return str(alveole.api("GET", f"instances/{identifier(operation)}")["address"])


@contextmanager
def silences(target: str) -> Iterator[Callable[[], float]]:
    """Ping an instance all the time; the longest that it took to answer since last asked, in seconds."""
    longest, over = [0.0], threading.Event()
    probe = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    probe.settimeout(10)
    probe.connect((target, 0))

    def ping() -> None:
        while not over.wait(_PING_S):
            header = struct.pack(">BBHHH", 8, 0, 0xF7FF - 0x0700, 0, 0x0700)  # all words add up to 0xFFFF
            began = time.perf_counter()
            with suppress(TimeoutError):
                probe.send(header)
                while probe.recv(200)[20] != 0:  # not a reply
                    continue
            longest[0] = max(longest[0], time.perf_counter() - began)

    def ask() -> float:
        found, longest[0] = longest[0], 0.0
        return found

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield ask
    finally:
        over.set()
        thread.join()
        probe.close()


@pytest.mark.parametrize("memory_mib", ROUNDS)
def test_fork_beside_qemu_by_hand(alveole: Alveole, report: Report, tmp_path: Path, memory_mib: int) -> None:
    """By hand: its memory is migrated to a file while it stands still, and a second QEMU starts from that."""
    original = holding(alveole, memory_mib)
    accelerator = alveole.api("GET", f"instances/{identifier(original)}")["status"]["machine"]["accelerator"]
    (initramfs,) = (alveole.daemon.state / "qemu").glob("initramfs-*")
    captures: list[float] = []
    pauses: list[float] = []

    def ours() -> float:
        made: list[Any] = []
        seconds = timed(lambda: made.append(fork(alveole, original)))
        captures.append(capture_s(made[0]))
        alveole.remove(made[0])
        return seconds

    machine = {"accelerator": accelerator, "memory_mib": memory_mib, "held_mib": HELD_MIB}
    with by_hand(find_kernel().image, initramfs, tmp_path, **machine) as raw:

        def theirs() -> float:
            pause_s, total_s = raw.fork()
            pauses.append(pause_s)
            return total_s

        mine, other = in_turn(ROUNDS[memory_mib], ours, theirs)
    what = f"fork of a vm of {memory_mib} MiB, {HELD_MIB} MiB of them written"
    _compare(report, f"{what}: step capture; beside the pause by hand", captures[1:], pauses[1:])
    _compare(report, f"{what}: until the fork runs; beside a second QEMU by hand", mine, other)
    alveole.remove(original)


def _compare(report: Report, what: str, mine: list[float], other: list[float]) -> None:
    report.add(TOPIC, Row(what, p50_p99(mine), p50_p99(other), f"{median(mine) / median(other):.2f}"))


def test_the_originals_pause(alveole: Alveole, report: Report) -> None:
    """As others see it: the longest that it took to answer a ping, asked every 2 ms, while it was forked."""
    original = holding(alveole, 256)
    with silences(address(alveole, original)) as ask:

        def pause() -> float:
            ask()
            made = fork(alveole, original)
            seconds = ask()
            alveole.remove(made)
            return seconds

        def calm() -> float:
            ask()
            time.sleep(0.5)
            return ask()

        forked, idle = in_turn(OF_EACH, pause, calm)
    limit = 50 + 250 * HELD_MIB / 1024  # promised of all its private memory, of which this is a part
    what = f"longest that an original of 256 MiB, {HELD_MIB} MiB written, took to answer a ping; beside one left alone"
    promise = at_most(round(median(forked) * 1000), round(limit), "ms")
    report.add(TOPIC, Row(what, p50_p99(forked), p50_p99(idle), "", promise))
    alveole.remove(original)


def test_generations(alveole: Alveole, report: Report) -> None:
    """A fork of a fork of a fork costs what the first does."""
    chain = [holding(alveole, 256)]
    for generation in range(1, GENERATIONS + 1):
        captures: list[float] = []

        def measure(parent: Any = chain[-1], captures: list[float] = captures) -> float:
            made: list[Any] = []
            seconds = timed(lambda: made.append(fork(alveole, parent)))
            captures.append(capture_s(made[0]))
            alveole.remove(made[0])
            return seconds

        (seconds,) = in_turn(OF_EACH, measure)
        what = f"fork of generation {generation}, 256 MiB: until it runs; its step capture"
        report.add(TOPIC, Row(what, p50_p99(seconds), p50_p99(captures[1:])))
        chain.append(fork(alveole, chain[-1]))
    for made in chain:
        alveole.remove(made)


@pytest.mark.parametrize("memory_mib", ROUNDS)
def test_sleep_and_wake(alveole: Alveole, report: Report, memory_mib: int) -> None:
    made = holding(alveole, memory_mib)
    path = f"instances/{identifier(made)}"
    asleep, woken = in_turn(
        ROUNDS[memory_mib],
        lambda: timed(lambda: alveole.done("POST", f"{path}/sleep", {})),
        lambda: timed(lambda: alveole.done("POST", f"{path}/start", {})),
    )
    what = f"vm of {memory_mib} MiB, {HELD_MIB} MiB written: sleep; wake"
    report.add(TOPIC, Row(what, p50_p99(asleep), p50_p99(woken)))
    alveole.remove(made)


def test_many_forks_of_one_moment(alveole: Alveole, report: Report) -> None:
    original = holding(alveole, 256)
    alone = _pss(alveole, [original])
    path = f"/v1/instances/{identifier(original)}/fork"
    copies: list[Any] = []

    def make() -> None:
        copies.append(alveole.daemon.api("POST", path, {})[1])
        body = {"moment": copies[0]["result"]["moment"]}
        copies.extend(alveole.daemon.api("POST", path, body)[1] for _ in range(COPIES - 1))
        for copy in copies:
            operation = f"/v1/operations/{copy['id']}"
            until(lambda op=operation: alveole.daemon.api("GET", op)[1]["state"] == "done", _COPIES_S)  # type: ignore[misc]

    seconds = timed(make)
    each = _pss(alveole, copies) / COPIES
    what = f"{COPIES} forks of one moment, 256 MiB, {HELD_MIB} MiB written: all run"
    report.add(TOPIC, Row(what, f"{seconds * 1000:.0f} ms ({seconds / COPIES * 1000:.0f} each)"))
    what = "memory (PSS) of each of these; beside their original by itself"
    report.add(TOPIC, Row(what, f"{each / 1e6:.0f} MB", f"{alone / 1e6:.0f} MB", f"{each / alone:.2f}"))
    for made in (*copies, original):
        alveole.remove(made)


def _pss(alveole: Alveole, operations: list[Any]) -> int:
    stats = (alveole.api("GET", f"instances/{identifier(operation)}/stats") for operation in operations)
    return sum(int(found["pss_bytes"]) for found in stats)
