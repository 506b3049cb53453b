"""The probe on this host: it agrees with the host, changes nothing, and is quick."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alveole.host.probe import firewall, machine, storage
from alveole.host.probe.finding import Status
from alveole.host.probe.survey import host_findings

pytestmark = pytest.mark.root


@pytest.mark.usefixtures("no_leftovers")
async def test_survey_finds_what_is_installed_and_leaves_nothing(tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    findings = {finding.name: finding for finding in await host_findings(tmp_path)}
    assert set(tmp_path.iterdir()) == before
    for name in ("kernel", "capabilities", "nftables", "overlayfs", "crun", "conmon", "seccomp profile"):
        assert findings[name].status is Status.OK, findings[name]
    assert findings["kernel"].found == os.uname().release


async def test_kvm_measurement_agrees_with_the_kind_of_host() -> None:
    """A PVM host emulates guest kernels; one without /dev/kvm has none."""
    finding = await machine.kvm()
    if not Path("/dev/kvm").exists():
        assert finding.found.startswith("absent")
    elif Path("/sys/module/kvm_pvm").exists():
        assert finding.found.startswith("emulated")
    else:
        assert re.match("native|emulated|absent", finding.found)


async def test_overlay_is_reported_missing_where_it_cannot_work(tmp_path: Path) -> None:
    """/proc cannot hold an overlay's directories: the finding says so instead of raising."""
    finding = await storage.overlay(Path("/proc/sys"))
    assert finding.status is Status.MISSING
    assert "/proc/sys" in finding.means


async def test_probe_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    """The daemon runs it at its start, while it already answers. Processor time, so that busy hosts do not matter."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            began = time.thread_time()
            await asyncio.sleep(0.001)
            longest = max(longest, time.thread_time() - began)

    async with asyncio.TaskGroup() as group:
        ticking = group.create_task(tick())
        await host_findings(tmp_path)
        ticking.cancel()
    assert longest < 0.05


AS_DOCKER_DOES = """
table ip filter {
  set blocked { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 }; }
  chain DOCKER-USER { }
  chain FORWARD { type filter hook forward priority 0; policy drop; jump DOCKER-USER; }
}
"""
LOOK = "import asyncio; from alveole.host.probe.firewall import *; print(asyncio.run(foreign_firewalls()).status)"
SCRIPT = f"""
printf '%s' '{AS_DOCKER_DOES}' | nft -f -
"$0" -c '{LOOK}'
nft insert rule ip filter DOCKER-USER iifname '"av*"' accept
"$0" -c '{LOOK}'
"""


def test_foreign_drop_is_found_in_the_kernel_and_gone_once_let_through() -> None:
    """In a network namespace of its own, with rules shaped as Docker's."""
    argv = ["unshare", "--net", "sh", "-e", "-c", SCRIPT, sys.executable]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["missing", "ok"]


def test_without_root_it_says_what_needs_root() -> None:
    """As an unprivileged user, in a world it can read."""
    code = "import json, sys; from alveole.entry.doctor import main; sys.exit(main('json'))"
    argv = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", sys.executable, "-B", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    if "Permission denied" in done.stderr and not done.stdout:
        pytest.skip("this checkout cannot be read by other users")
    unchecked = {item["name"] for item in json.loads(done.stdout) if "root" in item["means"]}
    assert {"nftables", "overlayfs", firewall.forwarding().name} <= unchecked
