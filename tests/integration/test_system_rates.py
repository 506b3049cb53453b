"""How fast instances receive and send, as their users limit it."""

import fcntl
import socket
import struct
import time
from collections.abc import Callable

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root

RATE_BPS = 512 << 10
SINK, SOURCE = 9000, 9001
SERVE = f"while :; do nc -l -p {SINK} >/dev/null; done & while :; do nc -l -p {SOURCE} </dev/zero; done"
LIMITS = ("--net-receive-bps", "512k", "--net-send-bps", "512k")
SETTLED_S, MEASURED_S = 0.3, 2.0  # the first moment is the burst's
TRIES = 5
_SIOCOUTQ = 0x5411


def connected(address: str, port: int) -> socket.socket:
    def attempt() -> socket.socket | None:
        try:
            return socket.create_connection((address, port), timeout=1)
        except OSError:
            return None

    connection = until(attempt, 60, f"a connection to port {port}")
    assert connection
    return connection


def unacknowledged(connection: socket.socket) -> int:
    return int(struct.unpack("=i", fcntl.ioctl(connection, _SIOCOUTQ, bytes(4)))[0])


def received_bps(address: str) -> float:
    """What arrives in the instance: sent and acknowledged, bytes a second."""
    with connected(address, SINK) as connection:
        return rate_bps(lambda: connection.send(bytes(1 << 16)), lambda sent: sent - unacknowledged(connection))


def sent_bps(address: str) -> float:
    with connected(address, SOURCE) as connection:
        return rate_bps(lambda: len(connection.recv(1 << 16)), lambda read: read)


def rate_bps(step: Callable[[], int], done: Callable[[int], int]) -> float:
    """``step`` moves some bytes and says how many; ``done``: how many of all moved have arrived."""
    moved, started = 0, time.monotonic()
    marks = []
    for end in (started + SETTLED_S, started + SETTLED_S + MEASURED_S):
        while time.monotonic() < end:
            try:
                moved += step()
            except TimeoutError:
                continue
        marks.append((done(moved), time.monotonic()))
    (before, since), (after, now) = marks
    return (after - before) / (now - since)


def is_limited(measure: Callable[[str], float], address: str) -> bool:
    """Whether it is: never above the rate, and near it in one of a few connections.

    A sandbox's own TCP recovers slowly from losses, so that a connection of its may stall for a while.
    """
    measured: list[float] = []
    while len(measured) < TRIES:
        measured.append(measure(address) / RATE_BPS)
        if measured[-1] > 5:
            return False
        if 0.5 < measured[-1] < 1.3:
            return True
        assert measured[-1] < 1.3, measured
    raise AssertionError(f"never near the rate: {measured}")


def limits_of(daemon: Daemon, name: str) -> tuple[bool, bool]:
    """Whether what it receives and what it sends is limited."""
    address = daemon.instance(name)["address"]
    return is_limited(received_bps, address), is_limited(sent_bps, address)


@pytest.mark.parametrize(
    "isolation", ["container", *(pytest.param(w, marks=pytest.mark.slow) for w in ("sandbox", "vm"))]
)
def test_limits_hold_through_restarts_of_daemon_and_instance(fresh_daemon: Daemon, isolation: str) -> None:
    for name, limits in (("free", ()), ("slow", LIMITS)):
        fresh_daemon.ok("run", "-d", "--name", name, "--isolation", isolation, *limits, "busybox", "sh", "-c", SERVE)
    assert limits_of(fresh_daemon, "free") == (False, False)
    assert limits_of(fresh_daemon, "slow") == (True, True)
    fresh_daemon.restart()
    assert limits_of(fresh_daemon, "slow") == (True, True)
    fresh_daemon.ok("stop", "-t", "0", "slow")
    fresh_daemon.ok("start", "slow")
    assert limits_of(fresh_daemon, "slow") == (True, True)


@pytest.mark.parametrize("network", ["host", "none"])
@pytest.mark.parametrize("flag", ["--net-receive-bps", "--net-send-bps"])
def test_a_network_that_is_not_its_own_cannot_be_limited(daemon: Daemon, flag: str, network: str) -> None:
    said = daemon.fails("run", "--rm", "--network", network, flag, "1m", "busybox", "true")
    assert f"cannot be limited on network {network}" in said
