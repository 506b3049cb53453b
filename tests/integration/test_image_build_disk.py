"""Systems built from recipes: made here, booted by their own boot loader and kernel, ended by their power button."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, finish, make_daemon, until

pytestmark = [pytest.mark.root, pytest.mark.slow]

RECIPES = Path(__file__).parents[2] / "recipes"
BUILD_S, BOOT_S = 900.0, 400.0
"""Emulated on processors shared with others, a boot of some 30 s takes several times as long."""

LOOP_LIMIT_MS = "1000"
"""While a system is made or emulated, a program or thread that is started waits for a processor, and its parent too."""

PLAIN = """
base = "debian:bookworm"
disk_mib = 1024
packages = ["openssh-server"]
commands = ["echo root:secret | chpasswd"]
"""


@pytest.fixture
def builder() -> Iterator[Daemon]:
    """A daemon whose state lies where containers may pass, as builds need."""
    directory = Path(tempfile.mkdtemp(prefix="alveole-build-"))
    directory.chmod(0o711)
    made = make_daemon(directory, {"ALVEOLE_TEST_LOOP_LIMIT_MS": LOOP_LIMIT_MS})
    try:
        made.start()
        yield made
    finally:
        try:
            finish(made)
        finally:
            shutil.rmtree(directory)


def banner(address: str) -> str:
    """What the SSH server says first; empty while it is not there."""
    try:
        with socket.create_connection((address, 22), 5) as connection:
            return connection.makefile().readline()
    except OSError:
        return ""


def build(daemon: Daemon, recipe: Path) -> None:
    daemon.ok("image", "build", "system", str(recipe), timeout=BUILD_S)
    daemon.ok("run", "-d", "--name", "os", "--isolation", "vm", "system", timeout=120)


def stop(daemon: Daemon) -> None:
    """Only a system that heard the button writes this, and ends before it is switched off."""
    daemon.ok("stop", "-t", "300", "os", timeout=BOOT_S)
    assert "Power down" in daemon.ok("logs", "os")
    assert daemon.instance("os")["status"]["exit_code"] == 0


@pytest.mark.parametrize("seeded", [True, False], ids=["cloud-init", "plain"])
def test_from_a_recipe_to_its_end(builder: Daemon, tmp_path: Path, *, seeded: bool) -> None:
    """It boots to a prompt, is reached at its address, and is stopped; what tells it its name is optional."""
    recipe = RECIPES / "debian-system.toml"
    if not seeded:
        recipe = tmp_path / "plain.toml"
        recipe.write_text(PLAIN)
    build(builder, recipe)
    prompt = "os login:" if seeded else "localhost login:"
    until(lambda: prompt in builder.ok("logs", "os"), BOOT_S, "a prompt on the console")
    address = builder.instance("os")["address"]
    until(lambda: banner(address), BOOT_S, "an answer of its SSH server")
    assert banner(address).startswith("SSH-2.0-")
    stop(builder)
