"""What goes wrong says so in one clear error, and leaves nothing behind."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, finish, free_port, make_daemon, until

pytestmark = pytest.mark.root

SLEEP = ("busybox", "sleep", "600")


@pytest.fixture
def clean(daemon: Daemon) -> Iterator[Daemon]:
    """After the failed run and the removal of its record, the host has what it had before."""
    before = _held(daemon)
    yield daemon
    daemon.clear()
    until(lambda: _held(daemon) == before, what="the host as it was")


def _held(daemon: Daemon) -> tuple[list[str], list[str], list[str]]:
    """Mounts, cgroups and directories of instances. Namespaces are pooled."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return (
        [mount for mount in mounts if f"{daemon.run_dir}/i" in mount or f"{daemon.run_dir}/storage/volumes" in mount],
        sorted(str(path) for path in Path("/sys/fs/cgroup").glob(f"*/alveole-{daemon.id}/*/")),
        [path.name for path in daemon.state.glob("instances/*")],
    )


def test_port_taken_by_the_host(clean: Daemon) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        said = clean.fails("run", "-d", "--name", "web", "-p", f"{port}:80", *SLEEP, code=125)
        assert str(port) in said
        until(lambda: clean.names("instances") == [])
    clean.ok("run", "-d", "--name", "web", "-p", f"{port}:80", *SLEEP)
    assert clean.phase("web") == "running"


def test_port_taken_by_another_instance(clean: Daemon) -> None:
    port = free_port()
    clean.ok("run", "-d", "--name", "first", "-p", f"{port}:80", *SLEEP)
    said = clean.fails("run", "-d", "--name", "second", "-p", f"{port}:80", *SLEEP, code=125)
    assert str(port) in said
    assert "first" in said
    clean.ok("rm", "-f", "first")
    clean.ok("run", "-d", "--name", "second", "-p", f"{port}:80", *SLEEP)
    assert clean.phase("second") == "running"


def test_port_taken_by_another_daemon(clean: Daemon, other_daemon: Daemon) -> None:
    port = free_port()
    other_daemon.ok("run", "-d", "-p", f"{port}:80", *SLEEP)
    assert str(port) in clean.fails("run", "-d", "-p", f"{port}:80", *SLEEP, code=125)


def test_name_taken(clean: Daemon) -> None:
    clean.ok("create", "--name", "web", "busybox", "true")
    said = clean.fails("run", "-d", "--name", "web", *SLEEP, code=125)
    assert "web" in said
    assert "alveole rm" in said
    assert len(clean.names("instances")) == 1


def test_unknown_image(clean: Daemon) -> None:
    said = clean.fails("run", "-d", "--name", "web", "--pull", "never", "nothing:1", code=125)
    assert "nothing:1" in said
    assert clean.names("instances") == []


def test_registry_unreachable(clean: Daemon) -> None:
    """Named, within seconds, and tried again when asked to."""
    reference = f"127.0.0.1:{free_port()}/web:1"
    began = time.monotonic()
    assert "127.0.0.1" in clean.fails("run", "-d", "--name", "web", reference, code=125)
    assert reference.split("/", maxsplit=1)[0] in clean.fails("image", "pull", reference)
    assert time.monotonic() - began < 20
    assert not [name for name in clean.names("images") if "web" in name]


def test_unknown_network(clean: Daemon) -> None:
    said = clean.fails("run", "-d", "--name", "web", "--network", "nowhere", *SLEEP, code=125)
    assert "nowhere" in said
    assert clean.names("instances") == []


@pytest.mark.parametrize("name", ["UPPER:/d", "../../etc:/d", "a b:/d"])
def test_bad_volume_name(clean: Daemon, name: str) -> None:
    assert name.partition(":")[0] in clean.fails("run", "-d", "-v", name, *SLEEP)
    assert clean.names("volumes") == []
    assert clean.names("instances") == []


def test_bind_source_missing(clean: Daemon) -> None:
    said = clean.fails("run", "-d", "-v", "/no/such/place:/d", *SLEEP, code=125)
    assert "/no/such/place" in said
    assert not Path("/no").exists()


def test_command_not_found(clean: Daemon, isolation: str) -> None:
    said = clean.fails("run", "--isolation", isolation, "busybox", "no-such-program", code=127)
    assert "no-such-program" in said
    clean.fails("run", "-d", "--isolation", isolation, "busybox", "/no/such", code=127)


def test_command_cannot_be_invoked(clean: Daemon, isolation: str) -> None:
    said = clean.fails("run", "--isolation", isolation, "busybox", "/etc/passwd", code=126)
    assert "/etc/passwd" in said


def test_unknown_user(clean: Daemon, isolation: str) -> None:
    assert "ghost" in clean.fails("run", "--isolation", isolation, "-u", "ghost", "busybox", "true", code=125)


def test_a_failed_run_with_rm_leaves_no_record(clean: Daemon, isolation: str) -> None:
    clean.fails("run", "--rm", "--isolation", isolation, "busybox", "no-such-program")
    until(lambda: clean.names("instances") == [])


def test_out_of_addresses(clean: Daemon) -> None:
    """A network of two addresses holds two; the third is told, and fits when one has gone."""
    pool = json.loads((clean.state / "host.json").read_text())["pool"]
    clean.ok("network", "create", "tiny", "--subnet", pool.replace(".0.0/16", ".200.0/30"))
    for name in ("one", "two"):
        clean.ok("run", "-d", "--name", name, "--network", "tiny", *SLEEP)
    said = clean.fails("run", "-d", "--name", "three", "--network", "tiny", *SLEEP, code=125)
    assert "address" in said
    clean.ok("rm", "-f", "one")
    clean.ok("run", "-d", "--name", "three", "--network", "tiny", *SLEEP)


def test_corrupt_image(clean: Daemon, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(os.urandom(50_000))
    said = clean.fails("image", "import", "bad", str(tmp_path / "bad.tar"))
    assert "bad.tar" in said or "tar" in said
    assert not [name for name in clean.names("images") if "bad" in name]


def test_too_much_memory_asked_for(clean: Daemon) -> None:
    assert "memory" in clean.fails("run", "-d", "--name", "huge", "-m", "900t", *SLEEP, code=125)


def test_missing_engine(tmp_path: Path, busybox_image: Path) -> None:
    """A host without crun: the daemon runs, sandboxes run, and a container says what is missing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for directory in reversed(os.environ["PATH"].split(":")):
        for program in Path(directory).glob("*") if Path(directory).is_dir() else ():
            link = programs / program.name
            link.unlink(missing_ok=True)
            link.symlink_to(program)
    (programs / "crun").unlink()
    daemon = make_daemon(tmp_path, {"PATH": str(programs)})
    try:
        daemon.start()
        daemon.ok("image", "import", "busybox", str(busybox_image))
        assert "crun" in daemon.fails("run", "-d", "--name", "web", *SLEEP, code=125)
        assert daemon.ok("run", "--rm", "--isolation", "sandbox", "busybox", "echo", "hi") == "hi"
    finally:
        finish(daemon)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 640 MB: a pool of volumes needs half of it."""
    disk, place = tmp_path / "disk", tmp_path / "small"
    disk.touch()
    os.truncate(disk, 640 << 20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@contextmanager
def full(ballast: Path) -> Iterator[None]:
    """A file system on which nothing more fits meanwhile, but what little it keeps for itself."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 20)) == 1 << 20:
            continue
        while file.write(bytes(1024)):
            continue
    try:
        yield
    finally:
        ballast.unlink()


def test_full_disk(small_disk: Path, busybox_image: Path) -> None:
    """Each action fails with an error that says why; what runs goes on; with space again, all works."""
    daemon = make_daemon(small_disk)
    daemon.log_path = small_disk.parent / "daemon.log"
    try:
        daemon.start()
        daemon.ok("image", "import", "busybox", str(busybox_image))
        daemon.ok("run", "-d", "--name", "before", *SLEEP)
        with full(small_disk / "ballast"):
            for words in (
                ("run", "-d", "--name", "big", "-v", "fresh:/d", *SLEEP),
                ("image", "import", "other", str(busybox_image)),
                ("volume", "create", "data", "--size", "16m"),
            ):
                said = daemon.fails(*words)
                assert "is full" in said or "no space" in said
            assert daemon.phase("before") == "running"
            assert daemon.ok("exec", "before", "echo", "alive") == "alive"
            daemon.ok("rm", "--force", "before")
            assert "before" not in daemon.names("instances")
        daemon.ok("image", "import", "other", str(busybox_image))
        daemon.ok("volume", "create", "data", "--size", "16m")
        daemon.ok("run", "--rm", "-v", "data:/d", "other", "touch", "/d/f")
    finally:
        finish(daemon)
