"""Whole operating systems, from the import of their disks to their end: booted by QEMU, seen as users see them."""

import json
import os
import pty
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, free_port, until
from tests.integration.systems import make_bootable

pytestmark = pytest.mark.root

BOOT_S = 120.0
"""Emulated on processors shared with others, a boot of some 12 s takes several times as long."""

USER_DATA = """#!/bin/sh
echo root:secret | chpasswd
hostname >/root/name
echo once >>/root/boots
nc -lk -p 7 -e cat /root/name /root/boots &
"""
IMAGE = "alpine:disk"


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("system") / "alpine.raw"
    make_bootable(target)
    return target


@pytest.fixture
def user_data(tmp_path: Path) -> str:
    path = tmp_path / "user-data"
    path.write_text(USER_DATA)
    return str(path)


@pytest.fixture
def system(fresh_daemon: Daemon, disk: Path, user_data: str) -> Daemon:
    """A daemon with a system that boots, called os, which has a port published."""
    fresh_daemon.ok("image", "import", "--type", "raw", IMAGE, str(disk), timeout=120)
    vm = ("--isolation", "vm", "--user-data", user_data, "-p", f"127.0.0.1:{free_port()}:7")
    fresh_daemon.ok("run", "-d", "--name", "os", *vm, IMAGE, timeout=60)
    return fresh_daemon


def await_login(daemon: Daemon, times: int = 1) -> None:
    until(lambda: daemon.ok("logs", "os").count("os login:") >= times, BOOT_S, "a prompt on the console")


def asked(address: tuple[str, int]) -> list[str]:
    """What the service in the system answers; nothing while it is not there."""
    try:
        with socket.create_connection(address, 5) as connection:
            return connection.makefile().read().split()
    except OSError:
        return []


def root_disks(daemon: Daemon) -> list[Path]:
    pools = (daemon.state / "volumes", daemon.run_dir / "storage/pool")
    return [disk for pool in pools for disk in pool.glob("roots/*.img")]


class Console:
    """`alveole console` in a terminal."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.ours, theirs = pty.openpty()
        argv = daemon.argv("console", name)
        self.process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.seen = b""

    def expect(self, text: bytes) -> None:
        """Wait for it, beyond what was waited for before."""
        give_up_at = time.monotonic() + BOOT_S
        while text not in self.seen:
            assert time.monotonic() < give_up_at, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.ours], [], [], 0.2)[0]:
                self.seen += os.read(self.ours, 4096)
        self.seen = self.seen.partition(text)[2]

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def log_in(self) -> None:
        self.expect(b"leaves it]")
        self.type(b"\r")
        for prompt, answer in ((b"login:", b"root"), (b"assword:", b"secret")):
            self.expect(prompt)
            self.type(answer + b"\r")
        self.expect(b"# ")

    def leave(self) -> int:
        self.type(b"\x1d")
        return self.process.wait(20)


@contextmanager
def console(daemon: Daemon, name: str = "os") -> Iterator[Console]:
    made = Console(daemon, name)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        os.close(made.ours)


def test_from_boot_to_removal(system: Daemon) -> None:
    """It boots, is told who it is, is reached, logged in to, stopped as by its power button, and keeps its disk."""
    await_login(system)
    published = system.instance("os")["spec"]["ports"][0]["host_port"]
    for address in ((system.instance("os")["address"], 7), ("127.0.0.1", published)):
        until(lambda address=address: asked(address), BOOT_S, f"an answer of {address}")  # type: ignore[misc]
        assert asked(address) == ["os", "once"]
    assert "OpenRC" in system.ok("logs", "os")

    with console(system) as terminal:
        terminal.expect(b"Welcome to Alpine Linux")  # what was there before
        terminal.log_in()
        terminal.type(b"echo ty''ped >/root/file; cat /root/file\r")
        terminal.expect(b"typed")
        assert terminal.leave() == 0
    assert "log in at its console" in system.fails("exec", "os", "true", code=125)
    assert "press its power button" in system.fails("kill", "-s", "USR1", "os")
    system.kill9()
    system.start()
    assert system.wait_phase("os", "running")["status"]["restarts"] == 0

    system.ok("stop", "os", timeout=120)
    ended = system.instance("os")["status"]
    assert (ended["exit_code"], ended["reason"]) == (0, "stopped")
    assert "Power down" in system.ok("logs", "os")
    system.ok("start", "os", timeout=60)
    address = (system.instance("os")["address"], 7)
    until(lambda: asked(address), BOOT_S, "an answer after the second boot")
    assert asked(address) == ["os", "once", "once"]

    (root,) = root_disks(system)
    system.ok("rm", "-f", "os", timeout=60)
    assert not root_disks(system), root


@pytest.mark.slow
def test_it_reboots_and_powers_off_by_itself(system: Daemon) -> None:
    """What a system does with its machine is done: a reboot is no end, a power-off is one, and no failure."""
    await_login(system)
    pid = system.instance("os")["status"]["pid"]
    with console(system) as terminal:
        terminal.log_in()
        terminal.type(b"reboot\r")
        terminal.expect(b"os login:")
        assert system.instance("os")["status"]["pid"] == pid
    with console(system) as terminal:
        terminal.log_in()
        terminal.type(b"poweroff\r")
        ended = system.wait_phase("os", "exited", BOOT_S)["status"]
        assert (ended["exit_code"], ended["reason"]) == (0, "powered off")
        assert terminal.process.wait(20) == 0


@pytest.mark.slow
def test_it_is_forked_and_sleeps(system: Daemon) -> None:
    """Nothing inside takes part: what is logged in goes on, and each fork is reached at an address of its own."""
    await_login(system)
    original = (system.instance("os")["address"], 7)
    until(lambda: asked(original), BOOT_S, "an answer of the original")
    with console(system) as terminal:
        terminal.log_in()
        terminal.type(b"mine=a''lone\r")
        terminal.expect(b"# ")
    forked = system.cli("fork", "--name", "twin", "os", timeout=60)
    assert (forked.returncode, forked.stdout) == (0, "twin\n")
    assert "SSH host keys are those of os" in forked.stderr
    assert system.instance("twin")["status"]["machine"]["shares_identity"]
    assert not system.instance("os")["status"]["machine"]["shares_identity"]
    twin = (system.instance("twin")["address"], 7)
    assert twin != original
    for address in (original, twin):
        until(lambda address=address: asked(address), BOOT_S, f"an answer of {address}")  # type: ignore[misc]
    with console(system, "twin") as terminal:
        terminal.expect(b"leaves it]")
        terminal.type(b"echo still-$mine >>/root/name\r")
        terminal.expect(b"# ")
        assert terminal.leave() == 0
    until(lambda: asked(twin) == ["os", "still-alone", "once"], BOOT_S, "what the session of the original knew")
    assert asked(original) == ["os", "once"]

    system.ok("sleep", "twin", timeout=60)
    assert not asked(twin)
    system.restart()
    system.ok("wake", "twin", timeout=60)
    until(lambda: asked(twin) == ["os", "still-alone", "once"], BOOT_S, "an answer after its sleep")
    assert system.instance("twin")["status"]["machine"]["shares_identity"]
    system.ok("rm", "-f", "twin", "os", timeout=60)
    assert not root_disks(system)


REFUSED = {
    "--env": ("-e", "A=1"),
    "--entrypoint": ("--entrypoint", "/bin/sh"),
    "--user": ("-u", "1"),
    "--workdir": ("-w", "/"),
    "a mount": ("--tmpfs", "/x"),
    "--health-cmd": ("--health-cmd", "true"),
    "--cap-add": ("--cap-add", "NET_ADMIN"),
    "--cap-drop": ("--cap-drop", "ALL"),
    "--read-only": ("--read-only",),
    "--stop-signal": ("--stop-signal", "SIGQUIT"),
    "--pids-limit": ("--pids-limit", "7"),
}


def test_what_has_no_meaning_is_refused_by_name(daemon: Daemon, tmp_path: Path, user_data: str) -> None:
    """Each wish alone; a disk that no BIOS starts; and what only a system can be told."""
    empty = tmp_path / "empty.raw"
    empty.write_bytes(bytes(1 << 20))
    daemon.ok("image", "import", "--type", "raw", "empty:disk", str(empty))
    vm = ("run", "-d", "--isolation", "vm")
    for what, words in REFUSED.items():
        assert f"error: {what}" in daemon.fails(*vm, *words, "empty:disk")
    assert "error: a COMMAND has no meaning for image empty:disk" in daemon.fails(*vm, "empty:disk", "sh")
    assert "no boot loader that a BIOS starts" in daemon.fails(*vm, "empty:disk")
    assert "at least 64 MiB" in daemon.fails(*vm, "-m", "16m", "empty:disk")
    key = tmp_path / "key.pub"
    key.write_text("ssh-ed25519 AAAA me@here\n")
    for flag, path in (("--user-data", user_data), ("--ssh-key", str(key))):
        assert f"error: {flag} is for" in daemon.fails("run", "-d", flag, path, "busybox", "true")
    shown = [item["spec"].get("ssh_keys") for item in daemon.api("GET", "/v1/instances")[1]["items"]]
    assert ["ssh-ed25519 AAAA me@here"] in shown, json.dumps(shown)
    daemon.clear()
    daemon.ok("image", "rm", "empty:disk")
