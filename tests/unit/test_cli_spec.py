"""From the options of `run` to an InstanceSpec that the API accepts."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alveole.cli.context import BadValueError
from alveole.cli.spec import instance_spec
from alveole.model.instance import InstanceSpec


def spec(image: str = "debian:12", command: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    made = instance_spec(image, command, options, {"HOME": "/root"})
    InstanceSpec.model_validate(made, extra="forbid")
    return made


def test_nothing_given_leaves_all_to_image_and_daemon() -> None:
    assert spec() == {"image": "debian:12"}


EVERYTHING: dict[str, Any] = dict(  # noqa: C408  (as keywords they read as the flags do)
    tty=True,
    stdin=True,
    remove_on_exit=True,
    publish=("8080:80", "127.0.0.1:53:53/udp"),
    env=("A=1", "HOME"),
    env_file=("A=0\nB=2\n",),
    volume=("data:/d:ro", "/srv:/srv"),
    mount=("type=tmpfs,target=/m",),
    tmpfs=("/t:size=1m",),
    network="backend",
    memory="256m",
    cpus=1.5,
    pids_limit=100,
    io_read_bps="10m",
    io_write_bps="5m",
    net_receive_bps="3m",
    net_send_bps="200k",
    restart="no",
    health_cmd="curl -f localhost",
    health_interval="5s",
    health_timeout="1s",
    health_retries=2,
    health_start_period="10s",
    entrypoint="/bin/x",
    user="www",
    workdir="/w",
    label=("tier=web", "blue"),
    cap_add=("net_admin",),
    cap_drop=("ALL", "CAP_CHOWN"),
    read_only=True,
    hostname="h1",
    isolation="sandbox",
    pull="never",
    stop_signal="SIGQUIT",
    stop_timeout="3",
)

EVERYTHING_MAPPED = {
    "image": "debian:12",
    "command": ["nginx", "-g"],
    "entrypoint": ["/bin/x"],
    "tty": True,
    "stdin": True,
    "remove_on_exit": True,
    "read_only": True,
    "user": "www",
    "network": "backend",
    "isolation": "sandbox",
    "pull": "never",
    "stop_signal": "SIGQUIT",
    "stop_grace_s": 3.0,
    "env": {"A": "1", "B": "2", "HOME": "/root"},
    "workdir": "/w",
    "hostname": "h1",
    "ports": [
        {"host_port": 8080, "instance_port": 80, "protocol": "tcp"},
        {"host_address": "127.0.0.1", "host_port": 53, "instance_port": 53, "protocol": "udp"},
    ],
    "mounts": [
        {"kind": "volume", "source": "data", "target": "/d", "read_only": True},
        {"kind": "bind", "source": "/srv", "target": "/srv", "read_only": False},
        {"kind": "tmpfs", "target": "/m", "read_only": False},
        {"kind": "tmpfs", "target": "/t", "read_only": False, "size_bytes": 1 << 20},
    ],
    "labels": {"tier": "web", "blue": ""},
    "cap_add": ["CAP_NET_ADMIN"],
    "cap_drop": ["ALL", "CAP_CHOWN"],
    "resources": {
        "memory_bytes": 256 << 20,
        "cpus": 1.5,
        "pids": 100,
        "io_read_bps": 10 << 20,
        "io_write_bps": 5 << 20,
        "net_receive_bps": 3 << 20,
        "net_send_bps": 200 << 10,
    },
    "restart": {"policy": "no"},
    "health": {
        "command": ["/bin/sh", "-c", "curl -f localhost"],
        "interval_s": 5.0,
        "timeout_s": 1.0,
        "retries": 2,
        "start_period_s": 10.0,
    },
}


def test_everything_given_is_mapped() -> None:
    assert spec(command=("nginx", "-g"), **EVERYTHING) == EVERYTHING_MAPPED


def test_another_entrypoint_drops_the_images_command() -> None:
    assert spec(entrypoint="/bin/sh")["command"] == []
    assert spec(entrypoint="")["entrypoint"] == []


@pytest.mark.parametrize("number", [0, -1])
def test_no_limit_of_processes_is_sent_as_none(number: int) -> None:
    assert spec(pids_limit=number)["resources"] == {"pids": None}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"memory": "1k"}, "--memory '1k': too little"),
        ({"cpus": 0.0}, "--cpus '0': not a number of processors"),
        ({"cpus": float("nan")}, "--cpus 'nan': not a number of processors"),
        ({"io_read_bps": "0"}, "--io-read-bps '0': nothing could be read"),
        ({"net_receive_bps": "0"}, "--net-receive-bps '0': nothing could be received"),
        ({"net_send_bps": "fast"}, "--net-send-bps 'fast': not a size"),
        ({"health_interval": "1s"}, "--health-interval '1s': there is nothing to check"),
        ({"health_cmd": "x", "health_retries": 0}, "--health-retries '0': too few"),
        ({"health_cmd": "x", "health_timeout": "1ms"}, "--health-timeout '1ms': too short"),
        ({"workdir": "tmp"}, "--workdir 'tmp': not absolute"),
        ({"hostname": "a_b"}, "--hostname 'a_b': not a host name"),
        ({"hostname": "h\n"}, "--hostname"),
        ({"stop_timeout": "2h"}, "--stop-timeout '7200': too long"),
        ({"cap_add": ("no such",)}, "--cap-add 'no such': not a capability"),
        ({"remove_on_exit": True, "restart": "always"}, "--rm 'always': it cannot be both"),
        ({"volume": ("a:/d", "b:/d/")}, "'/d': is mounted twice"),
    ],
)
def test_wrong_values_name_their_flag(options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadValueError) as caught:
        spec(**options)
    assert told in caught.value.message


def test_an_image_without_a_name_is_refused() -> None:
    with pytest.raises(BadValueError, match="IMAGE"):
        spec(image="")


TEXT = st.text(max_size=12)
MANY = st.lists(TEXT, max_size=2).map(tuple)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("memory", "io_read_bps", "restart", "workdir", "hostname", "entrypoint"), TEXT),
        **dict.fromkeys(("health_cmd", "health_interval", "health_start_period", "stop_timeout"), TEXT),
        **dict.fromkeys(("publish", "env", "env_file", "volume", "mount", "tmpfs", "label", "cap_add"), MANY),
        "cpus": st.floats(),
        "pids_limit": st.integers(-5, 5),
        "health_retries": st.integers(-2, 5),
        "tty": st.booleans(),
        "isolation": st.sampled_from(["container", "sandbox"]),
    },
)
LIKELY = st.fixed_dictionaries(
    {
        "memory": st.integers(0, 1 << 40).map(str),
        "cpus": st.floats(-1, 5000),
        "publish": st.lists(st.tuples(st.integers(0, 70000), st.integers(0, 70000)), max_size=3).map(
            lambda ports: tuple(f"{host}:{inside}" for host, inside in ports)
        ),
        "tmpfs": st.integers(0, 1 << 20).map(lambda size: (f"/t:size={size}",)),
        "hostname": st.from_regex(r"\A[a-zA-Z0-9.-]{1,70}\Z"),
        "stop_timeout": st.floats(0, 4000).map(lambda seconds: f"{seconds:f}"),
        "health_cmd": st.just("true"),
        "health_interval": st.floats(0, 2).map(lambda seconds: f"{seconds:f}"),
    }
)


@settings(max_examples=200)
@given(OPTIONS | LIKELY, MANY)
def test_what_is_accepted_here_is_accepted_there(options: dict[str, Any], command: tuple[str, ...]) -> None:
    """Whatever was typed, the user hears of it here by the name of the flag, or the API's model takes it."""
    with suppress(BadValueError):
        spec(command=command, **options)


def test_what_a_machine_is_run_by() -> None:
    assert spec(accelerator="tcg", no_template=True) == {"image": "debian:12", "accelerator": "tcg", "template": False}
    assert "template" not in spec(no_template=False)
