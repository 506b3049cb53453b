"""Measure in turn, compare medians, and write down what was found."""

import http.client
import json
import math
import os
import platform
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

PAGE = Path(__file__).parents[2] / "docs/reference/benchmarks.md"
COMMAND = "make bench"
TOPICS = ("Start", "Steps of a start", "Machines", "Forks", "Many", "Published port", "Command line")
"""Sections of the page. It is written when a run has filled all of them."""

_QUIET_LOAD = 1.0
_ANSWER_TIMEOUT_S = 120.0
_REST_S = 0.2  # before each measurement: what the one before left to be done in the background is not its cost


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. ``promise`` is empty, or the promised figure and whether it holds."""

    what: str
    alveole: str
    beside: str = ""
    ratio: str = ""
    promise: str = ""


@dataclass(slots=True)
class Report:
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # before the first measurement
    sections: dict[str, list[Row]] = field(default_factory=dict)

    def add(self, topic: str, row: Row) -> None:
        self.sections.setdefault(topic, []).append(row)
        print("\n" + " | ".join(filter(None, (topic, row.what, row.alveole, row.beside, row.ratio, row.promise))))

    @property
    def is_complete(self) -> bool:
        return set(self.sections) == set(TOPICS)

    def page(self) -> str:
        tables = [f"## {topic}\n\n{_table(self.sections[topic])}" for topic in TOPICS if topic in self.sections]
        return "\n".join([_head(self.load), *tables])


def _table(rows: Sequence[Row]) -> str:
    cells = [("what", "Alveole", "beside", "ratio", "promise"), ("---",) * 5]
    cells += [(row.what, row.alveole, row.beside, row.ratio, row.promise) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _head(load: float) -> str:
    busy = "" if load < _QUIET_LOAD else "\n\n**The host was busy with other work: ratios are rough, times too long.**"
    return f"""# Benchmarks

Written by `{COMMAND}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Figures are medians; what is compared ran in turn, in
one run on one host. Docker runs in its own network, mount and process namespaces.
[Where the time goes](../explanation/performance.md) says what they are made of.

{_host()}; load average before the run {load:.2f}.{busy}
"""


def _host() -> str:
    cpu = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "CPU")
    memory_kib = int(next(line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")).split()[1])
    system = next(line for line in _lines("/etc/os-release") if line.startswith("PRETTY_NAME")).split('"')[1]
    programs = [program for program in ("crun", "runsc", "conmon", "dockerd") if shutil.which(program)]
    versions = [_first_line(program, "--version").partition(",")[0] for program in programs]
    host = f"{os.cpu_count()} cores ({cpu}), {memory_kib / (1 << 20):.0f} GiB, {system}, kernel {platform.release()}"
    return f"{host}; {'; '.join(versions)}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _first_line(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def in_turn(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """A B A B: what each measure answers, after one round that does not count."""
    found: list[list[float]] = [[] for _ in measures]
    for number in range(rounds + 1):
        for measure, times in zip(measures, found, strict=True):
            time.sleep(_REST_S)
            figure = measure()
            if number:
                times.append(figure)
    return found


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def ms(seconds: Sequence[float]) -> str:
    """The median, and the range that holds all but the extremes."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return f"{median(ordered) * 1000:.1f} ms ({ordered[tenth] * 1000:.1f} to {ordered[-1 - tenth] * 1000:.1f})"


def p50_p99(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return f"p50 {median(ordered) * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms (n = {len(ordered)})"


def at_most(figure: float, limit: float, unit: str = "×") -> str:
    return f"≤ {limit:g} {unit}: {'kept' if figure <= limit else 'MISSED'}"


def at_least(figure: float, limit: float, unit: str = "×") -> str:
    return f"≥ {limit:g} {unit}: {'kept' if figure >= limit else 'MISSED'}"


def command(*argv: str) -> str:
    """Run a program that must succeed; its output."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(argv)} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_ANSWER_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(path: Path, method: str, target: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    """The JSON that an API at a Unix socket answers a request that must succeed: a connection each."""
    connection = _Connection(path)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, target, payload, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status < 300, f"{method} {target}: {answer.status} {content.decode(errors='replace')}"
        return json.loads(content or b"null")
    finally:
        connection.close()


def pss_bytes(pids: Sequence[int]) -> int:
    """Memory of these processes, what they share divided by its users."""
    total = 0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += 1024 * int(rollup.partition("\nPss:")[2].split()[0])
    return total
