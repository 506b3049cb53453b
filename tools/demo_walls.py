"""Set instances that serve HTTP at port 80 side by side: what each took to start, what it uses, how soon it answers.

tools/demo_walls.py NAME...
"""

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

_ALVEOLE = Path(sys.executable).with_name("alveole")
_HEAD = ("NAME", "WALL", "STARTED BY", "IN", "OF IT CREATE", "START", "MEMORY", "REQUEST", "ITS KERNEL")
_BEGIN = frozenset({"instance.run", "instance.start", "instance.restart", "instance.fork"})
_REQUESTS = 20
_TIMEOUT_S = 10.0


def ask(*words: str) -> Any:
    done = subprocess.run([_ALVEOLE, *words, "--format", "json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def seconds(operation: Mapping[str, Any]) -> float:
    began, ended = (datetime.fromisoformat(operation[name]) for name in ("created_at", "finished_at"))
    return (ended - began).total_seconds()


def begin_of(name: str, operations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last operation that made it run, if that is still known."""
    target = f"instance/{name}"
    made = (found for found in reversed(operations) if found["target"] == target and found["verb"] in _BEGIN)
    return next((found for found in made if any(step["name"] == "start" for step in found.get("steps", ()))), None)


def answer_s(address: str) -> float:
    """Of one request, connection included."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)
    connection.request("GET", "/")
    connection.getresponse().read()
    connection.close()
    return time.perf_counter() - began


def ms(figure_s: float) -> str:
    return f"{figure_s * 1000:.1f} ms" if figure_s < 1 else f"{figure_s:.1f} s"


def row(instance: Mapping[str, Any], used: Mapping[str, Any], begin: Mapping[str, Any] | None) -> tuple[str, ...]:
    steps = {step["name"]: step.get("duration_ms") for step in begin.get("steps", ())} if begin else {}
    step = {name: ms(steps[name] / 1000) if steps.get(name) is not None else "" for name in ("create", "start")}
    machine = instance["status"].get("machine") or {}
    kernel = {"container": "the host's", "sandbox": "gVisor's"}.get(instance["spec"]["isolation"], "")
    return (
        instance["name"],
        instance["spec"]["isolation"],
        begin["verb"].removeprefix("instance.") if begin else "",
        ms(seconds(begin)) if begin else "",
        step["create"],
        step["start"],
        f"{used['pss_bytes'] / 1e6:.1f} MB",
        ms(median(answer_s(instance["address"]) for _ in range(_REQUESTS))),
        f"{machine['kernel']}, {machine['accelerator']}" if "kernel" in machine else kernel,
    )


def main(names: Sequence[str]) -> int:
    operations, used = ask("operation", "ls"), {found["name"]: found for found in ask("stats", "--no-stream")}
    instances = {found["name"]: found for found in ask("inspect", *names)}
    rows = [_HEAD, *(row(instances[name], used[name], begin_of(name, operations)) for name in names)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(_HEAD))]
    for line in rows:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
