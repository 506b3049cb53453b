"""Requests a second through a published port, beside the same instance reached directly."""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.integration.daemon import free_port, until
from tests.perf.alveole import Alveole
from tests.perf.harness import Report, Row, at_least, command, in_turn

RECIPE = Path(__file__).parents[2] / "recipes/nginx.toml"
HOST, CLIENT = "198.18.0.1", "198.18.0.2"  # of the range set aside for benchmarks (RFC 2544)
ROUNDS = 5
SECONDS = 3
CONNECTIONS = 32
TOPIC = "Published port"


def test_published_port(alveole: Alveole, report: Report) -> None:
    """nginx as a container, asked by wrk in a namespace of its own, a hop away; and by wrk on the host."""
    alveole.cli("image", "build", "nginx", str(RECIPE))
    port = free_port()
    ports = [{"host_port": port, "instance_port": 80}]
    web = alveole.start_by_api(image="nginx", ports=ports, command=None)
    address = alveole.api("GET", f"instances/{web['result']['id']}")["address"]
    with _client(alveole) as inside:
        until(lambda: "200" in _head_of(inside, f"http://{HOST}:{port}/"), what="nginx's answer")
        _compare(report, "another machine's client", inside, f"http://{HOST}:{port}/", f"http://{address}/")
    _compare(report, "a client on the host, at 127.0.0.1", (), f"http://127.0.0.1:{port}/", f"http://{address}/")
    alveole.remove(web)


def _compare(report: Report, client: str, prefix: tuple[str, ...], published: str, direct: str) -> None:
    through, straight = in_turn(ROUNDS, lambda: _requests(prefix, published), lambda: _requests(prefix, direct))
    percent = 100 * median(through) / median(straight)
    what = f"{client}, {CONNECTIONS} connections; beside the instance's address"
    ours, beside = (f"{median(rates):,.0f} requests a second" for rates in (through, straight))
    report.add(TOPIC, Row(what, ours, beside, f"{percent:.0f} %", at_least(percent, 95, "%")))


def _requests(prefix: tuple[str, ...], url: str) -> float:
    """Answered requests a second. All must succeed."""
    output = command(*prefix, "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", url)
    assert "Non-2xx" not in output, output
    assert "Socket errors" not in output, output
    found = re.search(r"Requests/sec:\s+([\d.]+)", output)
    assert found, output
    return float(found[1])


def _head_of(prefix: tuple[str, ...], url: str) -> str:
    return command(*prefix, "curl", "--silent", "--head", "--retry", "20", "--retry-connrefused", url)


@contextmanager
def _client(alveole: Alveole) -> Iterator[tuple[str, ...]]:
    """argv that runs a program in a namespace joined to this host by a cable, with the pool routed over it.

    Nothing outside reaches an instance at its own address: one rule more lets this client do so, to compare.
    """
    name = f"bench{secrets.token_hex(3)}"
    inside = ("ip", "netns", "exec", name)
    command("ip", "netns", "add", name)
    try:
        command("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        command("ip", "address", "add", f"{HOST}/30", "dev", name)
        command("ip", "link", "set", name, "up")
        command(*inside, "ip", "address", "add", f"{CLIENT}/30", "dev", "eth0")
        command(*inside, "ip", "link", "set", "eth0", "up")
        command(*inside, "ip", "route", "add", "default", "via", HOST)
        table = f"alveole_{alveole.daemon.id}"
        rule = f"iifname {name} ct status and dnat == 0 accept"
        command("nft", "insert", "rule", "inet", table, "forward_ours", *rule.split())
        yield inside
    finally:
        command("ip", "netns", "delete", name)  # and with it both ends of the cable
