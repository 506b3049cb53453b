"""What `alveole stats` tells of memory: what is an instance's own, and its part of what others have too."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root


def used(daemon: Daemon, name: str) -> dict[str, Any]:
    (found,) = json.loads(daemon.ok("stats", "--no-stream", "--format", "json", name))
    return cast("dict[str, Any]", found)


def test_what_a_process_writes_is_the_instances_own(daemon: Daemon, isolation: str) -> None:
    """50 MiB in the memory of a process, which nobody takes out of its hands."""
    script = "until [ -e /go ]; do sleep 0.1; done; dd if=/dev/zero bs=50M count=1 | sleep 600"
    daemon.ok("run", "-d", "--name", "writer", "--isolation", isolation, "busybox", "sh", "-c", script)
    before = used(daemon, "writer")["own_bytes"]
    daemon.ok("exec", "writer", "touch", "/go")
    until(lambda: used(daemon, "writer")["own_bytes"] - before > 45 << 20, what="memory of its own")


def test_what_a_process_has_in_common_with_its_children_is_the_instances_own(daemon: Daemon) -> None:
    """As servers do that read everything and then fork their workers."""
    fill = "x=$(head -c 20000000 /dev/zero | tr '\\0' x)"
    script = f"{fill}; for n in 1 2 3; do (while :; do sleep 1; [ $n ]; done) & done; : > /ready; wait"
    daemon.ok("run", "-d", "--name", "server", "busybox", "sh", "-c", script)
    until(lambda: daemon.cli("exec", "server", "test", "-e", "/ready").returncode == 0)
    found = used(daemon, "server")
    assert found["own_bytes"] > 20_000_000
    assert found["shared_bytes"] < 5_000_000


def test_clones_of_a_template_share_what_they_did_not_write(daemon: Daemon) -> None:
    for name in ("one", "two"):
        daemon.ok("run", "-d", "--name", name, "--isolation", "vm", "busybox", "sleep", "600")
    for name in ("one", "two"):
        found = used(daemon, name)
        rollup = Path(f"/proc/{daemon.instance(name)['status']['pid']}/smaps_rollup").read_text()
        resident_bytes = int(rollup.partition("\nRss:")[2].split()[0]) << 10
        assert found["own_bytes"] < resident_bytes - (20 << 20)
        assert found["shared_bytes"] > 5 << 20
