"""What users may write after each flag, and what they are told when it is wrong."""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.cli import values
from alveole.cli.context import BadValueError

READERS: dict[str, Callable[[str, str], Any]] = {
    "--memory": values.size_bytes,
    "--health-interval": values.duration_s,
    "--label": values.pair,
    "--publish": values.port,
    "--volume": values.volume,
    "--mount": values.mount,
    "--tmpfs": values.tmpfs,
    "--restart": values.restart,
}


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("--memory", "4096", 4096),
        ("--memory", "1b", 1),
        ("--memory", "64k", 64 << 10),
        ("--memory", "512M", 512 << 20),
        ("--memory", "1.5g", 3 << 29),
        ("--memory", "2GiB", 2 << 30),
        ("--health-interval", "30", 30),
        ("--health-interval", "500ms", 0.5),
        ("--health-interval", "1m30s", 90),
        ("--health-interval", "1.5h", 5400),
        ("--label", "tier=web", ("tier", "web")),
        ("--label", "tier", ("tier", "")),
        ("--label", "a=b=c", ("a", "b=c")),
        ("--publish", "8080:80", {"host_port": 8080, "instance_port": 80, "protocol": "tcp"}),
        ("--publish", "53:53/udp", {"host_port": 53, "instance_port": 53, "protocol": "udp"}),
        (
            "--publish",
            "127.0.0.1:8080:80",
            {"host_address": "127.0.0.1", "host_port": 8080, "instance_port": 80, "protocol": "tcp"},
        ),
        ("--volume", "data:/d", {"kind": "volume", "source": "data", "target": "/d", "read_only": False}),
        ("--volume", "/srv:/d:ro", {"kind": "bind", "source": "/srv", "target": "/d", "read_only": True}),
        ("--volume", "/srv:/d:rw", {"kind": "bind", "source": "/srv", "target": "/d", "read_only": False}),
        (
            "--mount",
            "type=bind,src=/srv,dst=/d,readonly",
            {"kind": "bind", "source": "/srv", "target": "/d", "read_only": True},
        ),
        ("--mount", "source=data,target=/d", {"kind": "volume", "source": "data", "target": "/d", "read_only": False}),
        (
            "--mount",
            "type=tmpfs,destination=/t,tmpfs-size=1m",
            {"kind": "tmpfs", "target": "/t", "read_only": False, "size_bytes": 1 << 20},
        ),
        ("--tmpfs", "/t", {"kind": "tmpfs", "target": "/t", "read_only": False}),
        ("--tmpfs", "/t:size=64k,ro", {"kind": "tmpfs", "target": "/t", "read_only": True, "size_bytes": 64 << 10}),
        ("--restart", "always", {"policy": "always"}),
        ("--restart", "on-failure:3", {"policy": "on-failure", "max_retries": 3}),
    ],
)
def test_right_values_are_read(flag: str, text: str, expected: object) -> None:
    assert READERS[flag](flag, text) == expected


@pytest.mark.parametrize(
    ("flag", "text", "why"),
    [
        ("--memory", "", "not a size"),
        ("--memory", "12x", "not a size"),
        ("--memory", "-1", "not a size"),
        ("--memory", "1e9", "not a size"),
        ("--health-interval", "soon", "not a time"),
        ("--health-interval", "-3", "not a time"),
        ("--health-interval", "nan", "not a time"),
        ("--health-interval", "inf", "not a time"),
        ("--health-interval", "3s4", "not a time"),
        ("--label", "=x", "the key is missing"),
        ("--publish", "80", "the host port is missing"),
        ("--publish", "127.0.0.1::80", "the host port is missing"),
        ("--publish", "0:80", "the host port is missing"),
        ("--publish", "8000-8010:80-90", "port ranges are not supported"),
        ("--publish", "8080:80/sctp", "unknown protocol 'sctp'"),
        ("--publish", "8080:80/", "unknown protocol ''"),
        ("--publish", "8080:web", "'web' is not a port"),
        ("--publish", "8080:65536", "'65536' is not a port"),
        ("--publish", "8080:", "'' is not a port"),
        ("--publish", "8080:²", "'²' is not a port"),
        ("--publish", "[::1]:8080:80", "'[::1]' is not an IPv4 address"),
        ("--publish", "127.0.0.256:8080:80", "'127.0.0.256' is not an IPv4 address"),
        ("--volume", "/data", "source or target is missing"),
        ("--volume", ":/d", "source or target is missing"),
        ("--volume", "./x:/d", "is not absolute"),
        ("--volume", "data:d", "the target 'd' is not absolute"),
        ("--volume", "data:/d:rx", "unknown option 'rx'"),
        ("--mount", "type=nfs,target=/d", "unknown type 'nfs'"),
        ("--mount", "type=bind,target=/d", "the source is missing"),
        ("--mount", "type=tmpfs,source=x,target=/d", "a tmpfs has no source"),
        ("--mount", "type=volume,source=/srv,target=/d", "is not a volume's name"),
        ("--mount", "source=data,target=/d,mode=1", "unknown key 'mode'"),
        ("--mount", "source=data,target=/d,readonly=maybe", "readonly is 'maybe'"),
        ("--mount", "source=data,target=/d,tmpfs-size=1m", "only a tmpfs has a tmpfs-size"),
        ("--tmpfs", "t", "the target 't' is not absolute"),
        ("--tmpfs", "/t:mode=1777", "unknown option 'mode=1777'"),
        ("--tmpfs", "/t:size=1", "too small for a tmpfs"),
        ("--restart", "sometimes", "no such policy"),
        ("--restart", "always:3", "goes with on-failure only"),
        ("--restart", "on-failure:x", "goes with on-failure only"),
        ("--restart", "on-failure:", "goes with on-failure only"),
    ],
)
def test_wrong_values_name_flag_fault_and_what_is_valid(flag: str, text: str, why: str) -> None:
    with pytest.raises(BadValueError) as caught:
        READERS[flag](flag, text)
    message = caught.value.message
    assert message.startswith(f"{flag} ")
    assert why in message
    assert "; valid: " in message
    assert "\n" not in message


@given(st.text(max_size=40), st.sampled_from(sorted(READERS)))
def test_anything_is_read_or_refused(text: str, flag: str) -> None:
    """No other exception reaches the user, whatever was typed."""
    with suppress(BadValueError):
        READERS[flag](flag, text)


@given(st.integers(1, 65535), st.integers(1, 65535), st.sampled_from(["tcp", "udp"]))
def test_every_port_is_kept(host: int, inside: int, protocol: str) -> None:
    published = values.port("-p", f"{host}:{inside}/{protocol}")
    assert (published["host_port"], published["instance_port"], published["protocol"]) == (host, inside, protocol)


@given(st.integers(0, 1 << 60))
def test_sizes_in_bytes_are_exact(number: int) -> None:
    assert values.size_bytes("-m", str(number)) == number


def test_a_bare_variable_is_the_callers_and_left_out_if_there_is_none() -> None:
    chosen = values.environment("--env", ("A=1", "HOME", "NONE", "EMPTY="), {"HOME": "/root", "A": "2"})
    assert chosen == {"A": "1", "HOME": "/root", "EMPTY": ""}


@pytest.mark.parametrize("line", ["=x", "A=\0"])
def test_variables_that_cannot_be_are_refused(line: str) -> None:
    with pytest.raises(BadValueError, match="not an environment variable"):
        values.environment("--env", (line,), {})


def test_an_environment_file_has_comments_and_empty_lines() -> None:
    assert values.environment_file_lines("# c\n\n A=1\nB\n  #d\nC= x ") == ("A=1", "B", "C= x ")


@pytest.mark.parametrize(("text", "signal"), [("9", 9), ("term", "SIGTERM"), ("SIGHUP", "SIGHUP")])
def test_signals_are_numbers_or_names(text: str, signal: str | int) -> None:
    assert values.signal_value(text) == signal


def test_messages_stay_on_one_line() -> None:
    with pytest.raises(BadValueError) as caught:
        values.size_bytes("--memory", "1\n2")
    assert re.fullmatch(r"[^\n]*", caught.value.message)
