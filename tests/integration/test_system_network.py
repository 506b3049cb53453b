"""Networks as instances and users of the host see them."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.daemon import Daemon, free_port, until

pytestmark = pytest.mark.root

PERL = ("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "/usr/bin/perl", "-e")  # of the host: busybox speaks no UDP
UDP_ECHO = """
socket(S, 2, 2, 17) && bind(S, pack("Sna4x8", 2, 53, "")) || die $!;
while (1) { my $from = recv(S, my $said, 999, 0); send(S, $said, 0, $from) }
"""
ANSWER = "mkdir -p /www; echo {text} > /www/index.html; exec httpd -f -p {port} -h /www"


def serve(daemon: Daemon, name: str, *flags: str, text: str = "hello", port: int = 80) -> None:
    """An instance that answers HTTP with a text."""
    daemon.ok("run", "-d", "--name", name, *flags, "busybox", "sh", "-c", ANSWER.format(text=text, port=port))
    until(lambda: daemon.cli("exec", name, "wget", "-qO-", f"http://127.0.0.1:{port}/").returncode == 0)


def fetch(address: str, port: int, timeout_s: float = 5.0) -> str:
    """What an HTTP server says; raises OSError."""
    with socket.create_connection((address, port), timeout=timeout_s) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    return answer.decode().partition("\r\n\r\n")[2].strip()


def unreachable(address: str, port: int) -> bool:
    """Refused, or not answered in time."""
    try:
        fetch(address, port, timeout_s=0.5)
    except OSError:
        return True
    return False


def host_address() -> str:
    """The host's own address on the way out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def wget(daemon: Daemon, name: str, url: str) -> subprocess.CompletedProcess[str]:
    return daemon.cli("exec", name, "timeout", "2", "wget", "-qO-", url)  # its own -T breaks it


def refused(daemon: Daemon, url: str) -> None:
    """The instance named spy cannot reach it: no connection, or none in time."""
    done = wget(daemon, "spy", url)
    assert done.returncode == 143 or "can't connect" in done.stderr, (url, done)


def test_published_port(daemon: Daemon, isolation: str) -> None:
    """Reached from 127.0.0.1, ::1 and the host's own address; not any more after its removal."""
    port = free_port()
    serve(daemon, "web", "--isolation", isolation, "-p", f"{port}:80")
    for address in ("127.0.0.1", "::1", host_address()):
        assert fetch(address, port) == "hello", address
    daemon.ok("rm", "-f", "web")
    for address in ("127.0.0.1", "::1", host_address()):
        assert unreachable(address, port)


def test_port_published_at_one_address(daemon: Daemon) -> None:
    port = free_port()
    serve(daemon, "web", "-p", f"127.0.0.1:{port}:80")
    assert fetch("127.0.0.1", port) == "hello"
    assert unreachable(host_address(), port)


def test_published_udp_port(daemon: Daemon, isolation: str) -> None:
    port = free_port(socket.SOCK_DGRAM)
    flags = ("--isolation", isolation, "-v", "/usr:/usr:ro", "-p", f"{port}:53/udp")
    daemon.ok("run", "-d", "--name", "echo", *flags, "busybox", *PERL, UDP_ECHO)

    def asked() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(0.3)
            client.connect(("127.0.0.1", port))
            try:
                client.send(b"ping")
                return client.recv(100)
            except OSError:
                return b""

    assert until(asked) == b"ping"


def test_two_instances_share_no_host_port(daemon: Daemon) -> None:
    """The same port at two addresses is two ports; the same address is taken."""
    port = free_port()
    serve(daemon, "a", "-p", f"127.0.0.1:{port}:80", text="one")
    serve(daemon, "b", "-p", f"{host_address()}:{port}:80", text="two")
    assert (fetch("127.0.0.1", port), fetch(host_address(), port)) == ("one", "two")


def test_names_on_one_network(daemon: Daemon, isolation: str) -> None:
    """Instances of one network find each other by name, across walls, and reach each other."""
    daemon.ok("network", "create", "back")
    serve(daemon, "server", "--network", "back", "--isolation", isolation)
    daemon.ok("run", "-d", "--name", "client", "--network", "back", "busybox", "sleep", "60")
    assert wget(daemon, "client", "http://server/").stdout.strip() == "hello"
    assert wget(daemon, "client", "http://server.alveole/").stdout.strip() == "hello"
    found = daemon.ok("exec", "client", "nslookup", "server")
    assert daemon.instance("server")["address"] in found


def test_networks_are_apart(daemon: Daemon, isolation: str) -> None:
    """Neither the name nor the address of an instance on another network is reached."""
    for network in ("red", "blue"):
        daemon.ok("network", "create", network)
    serve(daemon, "secret", "--network", "red")
    daemon.ok("run", "-d", "--name", "spy", "--network", "blue", "--isolation", isolation, "busybox", "sleep", "60")
    assert daemon.cli("exec", "spy", "nslookup", "secret").returncode != 0
    refused(daemon, f"http://{daemon.instance('secret')['address']}/")


@contextmanager
def host_service(address: str) -> Iterator[int]:
    """A TCP service of the host at an address; yields its port."""
    with socket.create_server((address, 0)) as server:
        thread = threading.Thread(target=_greet, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def _greet(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhost")


def test_the_host_is_not_reached(daemon: Daemon, isolation: str) -> None:
    """An instance reaches no service of the host: not by its address, the gateway's, or a way round by localhost."""
    daemon.ok("run", "-d", "--name", "spy", "--isolation", isolation, "busybox", "sleep", "60")
    gateway = daemon.ok("exec", "spy", "sh", "-c", "sed -n 's/^nameserver //p' /etc/resolv.conf | head -1")
    with host_service("0.0.0.0") as port:
        assert fetch("127.0.0.1", port) == "host"
        for address in (host_address(), gateway, "127.0.0.1"):
            refused(daemon, f"http://{address}:{port}/")


def test_another_daemons_instance_is_not_reached(daemon: Daemon, other_daemon: Daemon) -> None:
    """Two daemons on one host: their instances are strangers, though the published port is open to all."""
    serve(other_daemon, "secret")
    daemon.ok("run", "-d", "--name", "spy", "busybox", "sleep", "60")
    refused(daemon, f"http://{other_daemon.instance('secret')['address']}/")
    assert daemon.cli("exec", "spy", "nslookup", "secret").returncode != 0


def test_no_network(daemon: Daemon, isolation: str) -> None:
    said = daemon.ok(
        "run",
        "--rm",
        "--network",
        "none",
        "--isolation",
        isolation,
        "busybox",
        "sh",
        "-c",
        "ls /sys/class/net; ip -o link 2>&1",
    )
    assert "eth0" not in said
    assert "lo" in said


def test_host_network(daemon: Daemon) -> None:
    """--network host shares the host's addresses and services."""
    with host_service("127.0.0.1") as port:
        command = ("timeout", "5", "wget", "-qO-", f"http://127.0.0.1:{port}/")
        assert daemon.ok("run", "--rm", "--network", "host", "busybox", *command) == "host"


def test_a_sandbox_refuses_the_host_network_by_name(daemon: Daemon) -> None:
    """Its network stack is its own: it cannot be the host's."""
    said = daemon.fails("run", "--rm", "--network", "host", "--isolation", "sandbox", "busybox", "true")
    assert "sandbox cannot share the host's network" in said


def test_an_address_that_nobody_has_leads_nowhere(daemon: Daemon) -> None:
    """It must not leave by the host's default route to whoever answers there."""
    daemon.ok("run", "--detach", "--name", "asker", "busybox", "sleep", "1000")
    own = str(daemon.instance("asker")["address"]).rsplit(".", 2)[0]
    said = daemon.cli("exec", "asker", "ping", "-c", "1", "-W", "2", f"{own}.77.77")
    assert said.returncode == 1
    assert "0 packets received" in said.stdout + said.stderr or "unreachable" in said.stdout + said.stderr


def test_an_instance_reaches_its_own_published_port(daemon: Daemon, isolation: str) -> None:
    """By the host's address, as any other client does."""
    port = free_port()
    serve(daemon, "web", "--isolation", isolation, "-p", f"{port}:80")
    assert wget(daemon, "web", f"http://{host_address()}:{port}/").stdout.strip() == "hello"


def test_a_used_network_stays(daemon: Daemon) -> None:
    daemon.ok("network", "create", "kept")
    daemon.ok("create", "--name", "user", "--network", "kept", "busybox", "true")
    assert "user" in daemon.fails("network", "rm", "kept")
    daemon.ok("rm", "user")
    daemon.ok("network", "rm", "kept")
    assert "kept" not in daemon.names("networks")
