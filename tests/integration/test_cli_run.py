"""`alveole run` in the foreground, against the real daemon: streams, exit codes, Ctrl-C, and what --rm leaves."""

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ALVEOLE = [sys.executable, "-m", "alveole"]
APPLETS = ("sh", "cat", "echo", "sleep")


@pytest.fixture(scope="module")
def daemon() -> Iterator[dict[str, str]]:
    """The environment of a command line whose daemon has one image, ``box``. Nothing of it stays."""
    with tempfile.TemporaryDirectory(prefix="alveole-cli-", dir="/tmp") as name:
        base = Path(name)
        base.chmod(0o755)  # the instances' shifted ids pass through it
        environment = {**os.environ, "ALVEOLE_SOCKET": str(base / "s"), "NO_COLOR": "1"}
        serve = [*ALVEOLE, "serve", "--state", str(base / "state"), "--run-dir", str(base / "run")]
        with (base / "log").open("wb") as log, subprocess.Popen(serve, env=environment, stderr=log) as process:
            try:
                _await_daemon(process, environment, base / "log")
                _busybox(base / "box.tar")
                _alveole(environment, "image", "import", "box", str(base / "box.tar")).check_returncode()
                yield environment
                left = _alveole(environment, "ls", "-q").stdout.split()
                assert not left, "a test left instances"
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


def _await_daemon(process: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    give_up_at = time.monotonic() + 30
    while _alveole(environment, "version").returncode:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up_at, log.read_text()
        time.sleep(0.1)


def _busybox(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.add("/bin/busybox", "bin/busybox")
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)


def _alveole(environment: dict[str, str], *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*ALVEOLE, *arguments], env=environment, input=given, capture_output=True, timeout=60, check=False
    )


def test_output_errors_and_exit_code_are_the_commands_own(daemon: dict[str, str]) -> None:
    done = _alveole(daemon, "run", "--rm", "box", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


@pytest.mark.parametrize(("command", "code"), [("nosuch", 127), ("/bin", 126)])
def test_a_command_that_cannot_run_has_the_shells_exit_code(daemon: dict[str, str], command: str, code: int) -> None:
    done = _alveole(daemon, "run", "--rm", "--name", "wrong", "box", command)
    assert done.returncode == code
    assert command in done.stderr.decode()
    _alveole(daemon, "rm", "-f", "wrong")


def test_input_of_any_size_comes_back_whole(daemon: dict[str, str]) -> None:
    data = os.urandom(5_000_000)
    done = _alveole(daemon, "run", "-i", "--rm", "box", "cat", given=data)
    assert done.returncode == 0
    assert done.stdout == data


def test_rm_has_freed_its_volume_when_it_returns(daemon: dict[str, str]) -> None:
    _alveole(daemon, "volume", "create", "--size", "64m", "data").check_returncode()
    _alveole(daemon, "run", "--rm", "-v", "data:/d", "box", "sh", "-c", "echo x > /d/f").check_returncode()
    removed = _alveole(daemon, "volume", "rm", "data")
    assert removed.returncode == 0, removed.stderr


@contextmanager
def _foreground(environment: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run whose command says "ready" once it handles signals."""
    line = [*ALVEOLE, "run", *arguments]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def test_ctrl_c_goes_to_the_instance(daemon: dict[str, str]) -> None:
    script = 'trap "echo got it; exit 9" INT; echo ready; while :; do sleep 0.1; done'
    with _foreground(daemon, "--rm", "box", "sh", "-c", script) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (9, b"got it\n", b"")


def test_a_second_ctrl_c_leaves_it_running(daemon: dict[str, str]) -> None:
    script = 'trap "echo ready" INT; echo ready; while :; do sleep 0.1; done'
    with _foreground(daemon, "--name", "kept", "box", "sh", "-c", script) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert b"detached: kept goes on" in err
    assert b"kept" in _alveole(daemon, "ps").stdout
    _alveole(daemon, "rm", "-f", "kept").check_returncode()
