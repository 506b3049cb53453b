"""Streams: foreground run, exec, attach, logs, terminals, events."""

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root

BOTH = "for i in 1 2 3; do echo out $i; echo err $i >&2; done"


class Terminal:
    """A command line on a terminal of its own, as a person would sit before it."""

    def __init__(self, argv: list[str], rows: int, columns: int) -> None:
        self.fd, end = pty.openpty()
        self.resize(rows, columns)
        self.process = subprocess.Popen(["setsid", "--ctty", *argv], stdin=end, stdout=end, stderr=end)
        os.close(end)
        self.seen = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        """Once the client has taken the terminal over: what comes before is not for the instance."""
        until(lambda: not termios.tcgetattr(self.fd)[3] & termios.ICANON, what="a raw terminal")
        os.write(self.fd, text.encode())

    def expect(self, text: str, timeout_s: float = 10.0) -> None:
        """Read until this appears beyond what was expected before."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"{text!r} did not appear; seen: {self.seen!r}"
            if select.select([self.fd], [], [], left_s)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError as error:  # the other end was closed
                    raise AssertionError(f"it ended before {text!r}; seen: {self.seen!r}") from error
        self.seen = self.seen.partition(text)[2]

    def code(self) -> int:
        with contextlib.suppress(OSError):
            while select.select([self.fd], [], [], 10)[0] and os.read(self.fd, 4096):
                continue
        return self.process.wait(timeout=10)


@contextmanager
def terminal(daemon: Daemon, *args: str, rows: int = 30, columns: int = 100) -> Iterator[Terminal]:
    made = Terminal(daemon.argv(*args), rows, columns)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        os.close(made.fd)


@pytest.fixture
def sleeper(daemon: Daemon, isolation: str) -> str:
    """An instance that waits to be looked into."""
    daemon.ok("run", "-d", "--name", "sleeper", "--isolation", isolation, "-e", "OWN=1", "busybox", "sleep", "600")
    return "sleeper"


def test_foreground_keeps_the_streams_apart(daemon: Daemon, isolation: str) -> None:
    done = daemon.cli("run", "--rm", "--isolation", isolation, "busybox", "sh", "-c", BOTH)
    assert done.stdout == "out 1\nout 2\nout 3\n"
    assert done.stderr == "err 1\nerr 2\nerr 3\n"


def test_foreground_input(daemon: Daemon, isolation: str) -> None:
    """All that is piped in arrives, then its end."""
    text = "".join(f"line {i}\n" for i in range(20_000))
    done = daemon.cli("run", "--rm", "-i", "--isolation", isolation, "busybox", "md5sum", input=text)
    expected = subprocess.run(["md5sum"], input=text, capture_output=True, text=True, check=True).stdout
    assert done.stdout == expected


def test_foreground_loses_no_output(daemon: Daemon, isolation: str) -> None:
    """Megabytes to the last byte, through the slowest pipe there is."""
    script = "dd if=/dev/zero bs=64k count=64 2>/dev/null | tr '\\0' a; echo; echo end"
    done = daemon.cli("run", "--rm", "--isolation", isolation, "busybox", "sh", "-c", script)
    assert len(done.stdout) == 64 * 65536 + 5
    assert done.stdout.endswith("a\nend\n")


def test_run_with_a_terminal(daemon: Daemon, isolation: str) -> None:
    """A shell with prompt and line editing: size and resize are seen, Ctrl-C ends what it runs, its code is carried."""
    with terminal(daemon, "run", "-it", "--rm", "--isolation", isolation, "busybox", "sh") as screen:
        screen.expect("# ")
        screen.type("stty size; test -t 0 && echo $TERM\n")
        screen.expect("30 100")
        screen.expect("xterm")
        screen.resize(40, 120)
        time.sleep(0.3)
        screen.type("stty size\n")
        screen.expect("40 120")
        screen.type("sleep 100\n")
        time.sleep(0.5)
        screen.type("\x03")
        screen.expect("# ")
        screen.type("exit 9\n")
        assert screen.code() == 9


def test_exec_with_a_terminal(daemon: Daemon, sleeper: str) -> None:
    with terminal(daemon, "exec", "-it", sleeper, "sh") as screen:
        screen.expect("# ")
        screen.type("stty size\n")
        screen.expect("30 100")
        screen.resize(11, 44)
        time.sleep(0.3)
        screen.type("stty size\n")
        screen.expect("11 44")
        screen.type("sleep 100\n")
        time.sleep(0.5)
        screen.type("\x03")
        screen.expect("# ")
        screen.type("exit 4\n")
        assert screen.code() == 4


def test_attach_to_a_terminal(daemon: Daemon, isolation: str) -> None:
    """Who left an interactive instance finds it as it was."""
    daemon.ok("run", "-d", "-it", "--name", "shell", "--isolation", isolation, "busybox", "sh")
    until(lambda: "# " in daemon.cli("logs", "shell").stdout)
    with terminal(daemon, "attach", "shell") as screen:
        screen.type("\n")
        screen.expect("# ")
        screen.type("x=kept; echo s''et\n")
        screen.expect("set")
    with terminal(daemon, "attach", "shell") as screen:
        screen.type("echo is $x\n")
        screen.expect("is kept")
    assert daemon.phase("shell") == "running"


def test_exec_result(daemon: Daemon, sleeper: str) -> None:
    """Streams apart, codes carried, environment, user and workdir as told, the instance's own environment below."""
    done = daemon.cli("exec", sleeper, "sh", "-c", BOTH + "; exit 5")
    assert (done.returncode, done.stdout.count("out"), done.stderr.count("err")) == (5, 3, 3)
    flags = ("-e", "EXTRA=2", "-u", "user", "-w", "/var")
    said = daemon.ok("exec", *flags, sleeper, "sh", "-c", "echo $OWN $EXTRA; id -u; id -G; pwd")
    assert said.splitlines() == ["1 2", "1000", "1000 2000", "/var"]


def test_exec_input(daemon: Daemon, sleeper: str) -> None:
    assert daemon.ok("exec", "-i", sleeper, "sort", input="b\nc\na\n") == "a\nb\nc"


def test_exec_failures(daemon: Daemon, sleeper: str) -> None:
    """127 for what does not exist, 126 for what cannot be run, 1 or 125 for what is not there at all."""
    daemon.fails("exec", sleeper, "no-such-program", code=127)
    daemon.fails("exec", sleeper, "/etc/passwd", code=126)
    assert "does not exist" in daemon.fails("exec", "nobody", "true", code=125)
    assert "ghost" in daemon.fails("exec", "-u", "ghost", sleeper, "true")
    daemon.ok("stop", "-t", "0", sleeper)
    assert "not running" in daemon.fails("exec", sleeper, "true", code=125)


def test_commands_at_once(daemon: Daemon, sleeper: str) -> None:
    """Requests that reach the instance in one piece are each taken for what they are."""
    words = [f"word{i}" for i in range(6)]
    clients = [
        subprocess.Popen(daemon.argv("exec", sleeper, "echo", word), stdout=subprocess.PIPE, text=True)
        for word in words
    ]
    assert [client.communicate(timeout=60)[0].strip() for client in clients] == words


def test_exec_killed_by_a_signal(daemon: Daemon, sleeper: str) -> None:
    assert daemon.cli("exec", sleeper, "sh", "-c", "kill -9 $$").returncode == 137


def test_exec_ends_with_its_client(daemon: Daemon, sleeper: str) -> None:
    """A client that vanishes leaves no process behind in the instance."""
    with subprocess.Popen(daemon.argv("exec", sleeper, "sleep", "4321")) as client:
        try:
            until(lambda: "4321" in daemon.ok("exec", sleeper, "ps"))
        finally:
            client.kill()
    until(lambda: "4321" not in daemon.ok("exec", sleeper, "ps"))


def test_interrupt_reaches_a_foreground_run(daemon: Daemon, isolation: str) -> None:
    """Ctrl-C at the client is SIGINT for the instance, and its code comes back."""
    script = "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.1; done"
    argv = daemon.argv("run", "--rm", "--isolation", isolation, "busybox", "sh", "-c", script)
    client = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    with client.stdout as output:
        assert output.readline() == "ready\n"
        client.send_signal(signal.SIGINT)
        assert output.read() == "caught\n"
    assert client.wait(timeout=10) == 7


def test_logs(daemon: Daemon, isolation: str) -> None:
    """Streams apart, the last lines, times, and only what is newer."""
    script = BOTH + "; sleep 1.2; echo late"
    daemon.cli("run", "--name", "talker", "--isolation", isolation, "busybox", "sh", "-c", script)
    done = daemon.cli("logs", "talker")
    assert done.stdout.splitlines() == ["out 1", "out 2", "out 3", "late"]
    assert done.stderr.splitlines() == ["err 1", "err 2", "err 3"]
    assert daemon.ok("logs", "--tail", "1", "talker") == "late"
    assert daemon.ok("logs", "--tail", "0", "talker") == ""
    stamped = daemon.ok("logs", "--timestamps", "--tail", "1", "talker")
    moment = stamped.split()[0]
    assert moment.startswith("20")
    assert "T" in moment
    assert daemon.ok("logs", "--since", moment, "talker") in {"late", ""}
    assert daemon.ok("logs", "--since", "1h", "talker").splitlines()[-1] == "late"
    assert daemon.ok("logs", "--since", "2099-01-01T00:00:00Z", "talker") == ""


def test_logs_follow_to_the_end(daemon: Daemon, isolation: str) -> None:
    """-f shows lines as they come and ends with the instance."""
    script = "for i in 1 2 3 4; do echo $i; sleep 0.3; done"
    daemon.ok("run", "-d", "--name", "ticker", "--isolation", isolation, "busybox", "sh", "-c", script)
    assert daemon.ok("logs", "-f", "ticker").split() == ["1", "2", "3", "4"]


def test_logs_of_long_lines_and_bytes(daemon: Daemon) -> None:
    """A line of 100 kB comes back whole; bytes that are no text do no harm; a last line without an end is shown."""
    script = "head -c 100000 /dev/zero | tr '\\0' x; echo; printf 'a\\377b\\n'; printf last"
    daemon.ok("run", "-d", "--name", "odd", "busybox", "sh", "-c", script)
    daemon.ok("wait", "odd")
    lines = daemon.cli("logs", "odd").stdout.split("\n")
    assert lines[0] == "x" * 100_000
    assert lines[1].startswith("a")
    assert lines[1].endswith("b")
    assert lines[2] == "last"


def test_events_resume(daemon: Daemon) -> None:
    """From a token on, each later change is seen once, in order; a token of another store is refused."""
    token = daemon.api("GET", "/v1/instances")[1]["revision"]
    daemon.ok("create", "--name", "seen", "busybox", "true")
    daemon.ok("rm", "seen")
    first = _events_until_removed(daemon, token, "seen")
    actions = [event["action"] for event in first if event["name"] == "seen"]
    assert (actions[0], actions[-1]) == ("created", "removed")
    assert _events_until_removed(daemon, first[2]["token"], "seen") == first[3:]
    assert daemon.fails("events", "--from", "ffffffff:1")


def _events_until_removed(daemon: Daemon, token: str, name: str) -> list[dict[str, str]]:
    argv = daemon.argv("events", "--format", "json", "--from", token)
    client = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    found = []
    with client.stdout as output:
        for line in output:
            found.append(json.loads(line))
            if (found[-1]["name"], found[-1]["action"]) == (name, "removed"):
                break
    client.kill()
    client.wait()
    return found


def test_stats(daemon: Daemon, isolation: str) -> None:
    """Memory, processor time, processes and traffic are counted."""
    loop = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 60"
    daemon.ok("run", "-d", "--name", "worker", "-m", "128m", "--isolation", isolation, "busybox", "sh", "-c", loop)
    time.sleep(1)
    (used,) = json.loads(daemon.ok("stats", "--no-stream", "--format", "json", "worker"))
    assert used["cpu_s"] > 0.05
    assert 50_000 < used["memory_bytes"] < 128 << 20
    overhead_bytes = 256 << 20 if isolation == "vm" else 0  # of QEMU
    assert used["memory_limit_bytes"] == (128 << 20) + overhead_bytes
    assert used["pids"] >= 1
    assert used["own_bytes"] > 0
    assert used["shared_bytes"] >= 0
    assert used["pss_bytes"] == used["own_bytes"] + used["shared_bytes"]
    assert used["received_bytes"] >= 0
    assert "worker" in daemon.ok("stats", "--no-stream")
