"""The daemons that the tests of the whole system talk to."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, finish, make_daemon

IMAGE = "busybox"


@pytest.fixture(scope="session")
def busybox_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system of one static program and its names, as a tar."""
    directory = tmp_path_factory.mktemp("busybox")
    root = directory / "root"
    for name in ("bin", "etc", "tmp", "var", "root", "home/user"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nuser:x:1000:\nextra:x:2000:user\n")
    subprocess.run(["cp", "/bin/busybox", root / "bin/busybox"], check=True)
    for applet in subprocess.run(["/bin/busybox", "--list"], check=True, capture_output=True, text=True).stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    tar = directory / "busybox.tar"
    subprocess.run(["tar", "-C", root, "--owner=0", "--group=0", "-cf", tar, "."], check=True)
    return tar


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory, busybox_image: Path) -> Iterator[Daemon]:
    made = make_daemon(tmp_path_factory.mktemp("daemon"))
    try:
        made.start()
        made.ok("image", "import", IMAGE, str(busybox_image))
        yield made
    finally:
        finish(made)


@pytest.fixture
def daemon(shared_daemon: Daemon) -> Iterator[Daemon]:
    """A daemon with a busybox image and nothing else, for tests that do not disturb others."""
    yield shared_daemon
    shared_daemon.clear()
    faults = shared_daemon.new_faults()
    assert not faults, "\n".join(faults)


@pytest.fixture
def fresh_daemon(tmp_path: Path, busybox_image: Path) -> Iterator[Daemon]:
    """A daemon that the test may kill, stop and starve."""
    made = make_daemon(tmp_path)
    try:
        made.start()
        made.ok("image", "import", IMAGE, str(busybox_image))
        yield made
    finally:
        finish(made)


@pytest.fixture
def other_daemon(tmp_path: Path, busybox_image: Path) -> Iterator[Daemon]:
    """A second one beside the first, on the same host."""
    made = make_daemon(tmp_path / "other")
    made.state.parent.mkdir()
    try:
        made.start()
        made.ok("image", "import", IMAGE, str(busybox_image))
        yield made
    finally:
        finish(made)


@pytest.fixture(params=["container", "sandbox", "vm"])
def isolation(request: pytest.FixtureRequest) -> str:
    return str(request.param)
