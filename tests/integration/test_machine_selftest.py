"""The self-test boots a real machine, and leaves nothing of it."""

import subprocess
import tempfile
from pathlib import Path

import pytest

from alveole.host.probe.finding import Status
from alveole.runtime.qemu.selftest import machine_findings

pytestmark = pytest.mark.root
PREFIX = "alveole-selftest-"


def left() -> list[str]:
    processes = subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True).stdout.splitlines()
    files = [str(path) for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*")]
    return [*files, *(line for line in processes if f"/{PREFIX}" in line)]


async def test_a_machine_boots_when_it_is_interpreted() -> None:
    (finding,) = await machine_findings(60.0, ("tcg",))
    assert finding.status is Status.OK, finding
    assert "booted in" in finding.found
    assert not left()


async def test_one_that_does_not_boot_in_time_is_ended_and_told() -> None:
    (finding,) = await machine_findings(0.05, ("tcg",))
    assert finding.status is Status.MISSING
    assert "not ready within 0.05 s" in finding.found
    assert not left()


async def test_an_accelerator_that_qemu_does_not_have_is_told_with_its_words() -> None:
    (finding,) = await machine_findings(20.0, ("none-such",))
    assert "none-such" in finding.found
    assert not left()
