"""What is measured: a daemon of its own, Docker beside it, and the report that all add to."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import busybox_image
from tests.integration.daemon import Daemon
from tests.perf.alveole import Alveole
from tests.perf.docker import Docker, running_docker
from tests.perf.harness import PAGE, Report

__all__ = ["busybox_image"]


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Iterator[Report]:
    made = Report()
    yield made
    print(f"\n{made.page()}")
    if made.is_complete:
        PAGE.write_text(made.page())


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """Where users have their state: on a disk, in directories that all may pass."""
    made = Path("/var/lib", f"alveole-bench-{secrets.token_hex(2)}")
    made.mkdir(mode=0o755)
    yield made
    made.rmdir()


@pytest.fixture(scope="session")
def alveole(place: Path, busybox_image: Path) -> Iterator[Alveole]:
    daemon = Daemon(place / "state", Path(f"/run/alv-b-{secrets.token_hex(2)}"))
    del daemon.env["ALVEOLE_TEST_LOOP_LIMIT_MS"]  # users run without it
    try:
        daemon.start()
        daemon.ok("image", "import", "busybox", str(busybox_image))
        yield Alveole(daemon)
        daemon.clear()
        daemon.stop()
    finally:
        daemon.destroy()
        daemon.log_path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def docker(place: Path, busybox_image: Path) -> Iterator[Docker]:
    with running_docker(place / "docker", busybox_image) as made:
        yield made
