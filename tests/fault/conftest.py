"""What the fault tests share: an image, and daemons made to be killed."""

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import pytest

from tests.fault.disk import Disk, small_disk
from tests.fault.host import SETTLE_S, Victim
from tests.integration.daemon import until

_DISK_BYTES = 256 << 20
_PROGRAMS = ("sh", "sleep", "httpd", "cat", "true", "sync", "printf", "dd", "ls", "touch")


class MakeVictim(Protocol):
    def __call__(self, state: Path | None = None) -> Victim: ...


@pytest.fixture(scope="session")
def busybox_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("busybox")
    programs = directory / "root/bin"
    programs.mkdir(parents=True)
    subprocess.run(["cp", "/bin/busybox", programs / "busybox"], check=True)
    for name in _PROGRAMS:
        (programs / name).symlink_to("busybox")
    tar = directory / "busybox.tar"
    subprocess.run(["tar", "-C", programs.parent, "--owner=0", "--group=0", "-cf", tar, "."], check=True)
    return tar


@pytest.fixture(scope="session")
def small_tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two more images, of one file each."""
    directory = tmp_path_factory.mktemp("small")
    tars = [directory / f"{name}.tar" for name in ("first", "second")]
    for tar in tars:
        file = directory / tar.stem
        file.write_text(tar.name)
        subprocess.run(["tar", "-C", directory, "--owner=0", "--group=0", "-cf", tar, file.name], check=True)
    return tars


@pytest.fixture(scope="session")
def make_victim(busybox_tar: Path) -> Iterator[MakeVictim]:
    """A function that starts a daemon with a busybox image, below a directory that others may pass, as in /var/lib."""
    directories = ExitStack()

    def make(state: Path | None = None) -> Victim:
        if state is None:
            directory = Path(directories.enter_context(TemporaryDirectory(prefix="alv-f-")))
            directory.chmod(0o711)
            state = directory / "state"
        victim = Victim(state, Path(f"/run/alv-f-{secrets.token_hex(2)}"))
        try:
            victim.start()
            victim.ok("image", "import", "busybox", str(busybox_tar))
        except BaseException:
            victim.destroy()
            raise
        return victim

    with directories:
        yield make


@pytest.fixture
def victim(make_victim: MakeVictim) -> Iterator[Victim]:
    """A daemon of the test's own. At the end it must be able to remove everything and leave nothing."""
    made = make_victim()
    try:
        yield made
        finish(made)
    finally:
        made.destroy()


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    """Of 256 MiB, if no parameter says otherwise."""
    with small_disk(getattr(request, "param", _DISK_BYTES)) as made:
        yield made


@pytest.fixture
def cramped_victim(make_victim: MakeVictim, disk: Disk) -> Iterator[Victim]:
    """Its state directory is on the small disk. In the end there is space again, and it must have lived through it."""
    made = make_victim(disk.place / "state")
    try:
        yield made
        disk.free()
        assert not made.ended, made.log()
        made.settle()
        finish(made)
    finally:
        made.destroy()
        for name in ("arm", "trace", "state.log"):
            (disk.place / name).unlink(missing_ok=True)


def finish(victim: Victim) -> None:
    victim.arm.unlink(missing_ok=True)
    if victim.ended:
        victim.start()
    victim.clear()
    assert victim.stop() == 0, victim.log()
    until(lambda: not victim.leftovers(), SETTLE_S, f"a host without {victim.leftovers()}")
    faults = victim.new_faults()
    assert not faults, "\n".join(faults)
