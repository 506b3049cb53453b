"""What all tiers share: the result of a tier, and the check that a test left the host as it was."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

from tests import inventory

GRACE_S = 3.0
"""How long the kernel and reaped children may take to let go of what a test used."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", type=Path, help="write the numbers to this file; fail if no test passed")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A tier in which nothing passed has shown nothing: it fails."""
    path: Path | None = session.config.getoption("--tier")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if path is None or hasattr(session.config, "workerinput") or not isinstance(reporter, TerminalReporter):
        return
    passed, failed, skipped = (
        sum(len(reporter.stats.get(kind, ())) for kind in kinds)
        for kinds in (("passed", "xfailed"), ("failed", "error", "xpassed"), ("skipped",))
    )
    seconds = time.monotonic() - session.config.stash[_STARTED]
    path.write_text(f"{passed}\t{failed}\t{skipped}\t{seconds:.1f}\n")
    if not passed:
        reporter.ensure_newline()
        reporter.write_line(f"tier {path.name}: nothing passed ({skipped} skipped)", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Fail the test if the host is not as it was before it."""
    before = inventory.take()
    yield
    deadline = time.monotonic() + GRACE_S
    while (differences := inventory.difference(before, inventory.take())) and time.monotonic() < deadline:
        time.sleep(0.1)
    if differences:
        pytest.fail("the test changed the host:\n" + "\n".join(differences))


_STARTED = pytest.StashKey[float]()
