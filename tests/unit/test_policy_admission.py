"""A spec that cannot work is refused before anything is written, naming the field."""

import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import InstanceSpec
from alveole.policy.admission import check_spec, signal_number


def spec(**fields: Any) -> InstanceSpec:
    return InstanceSpec.model_validate({"image": "app", **fields})


def port(**fields: Any) -> dict[str, Any]:
    return {"host_port": 8080, "instance_port": 80, **fields}


def mount(**fields: Any) -> dict[str, Any]:
    return {"kind": "volume", "source": "data", "target": "/data", **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ports": [port(), port(protocol="udp"), port(host_address="127.0.0.1")]},
        {"mounts": [mount(), mount(target="/data/inner"), mount(kind="tmpfs", source="", target="/dev/shm")]},
        {"restart": {"policy": "on-failure", "max_retries": 3}, "stop_signal": "SIGINT", "env": {"A": "b=c"}},
        {"network": "host", "command": ["a"], "remove_on_exit": True},
        {"network": "none", "hostname": "box"},
    ],
)
def test_good_specs(fields: dict[str, Any]) -> None:
    check_spec(spec(**fields))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"network": "host", "ports": [port()]}, "spec.ports"),
        ({"network": "none", "ports": [port()]}, "spec.ports"),
        ({"ports": [port(), port(instance_port=81)]}, "spec.ports[1]"),
        ({"ports": [port(host_address="localhost")]}, "spec.ports[0].host_address"),
        ({"ports": [port(host_address="256.0.0.1")]}, "spec.ports[0].host_address"),
        ({"ports": [port(host_address="010.0.0.1")]}, "spec.ports[0].host_address"),
        ({"ports": [port(host_address="1.2.3.²")]}, "spec.ports[0].host_address"),
        ({"ports": [port(host_address="::1")]}, "spec.ports[0].host_address"),
        ({"mounts": [mount(target="/")]}, "spec.mounts[0].target"),
        ({"mounts": [mount(target="/proc/")]}, "spec.mounts[0].target"),
        ({"mounts": [mount(target="/sys/kernel")]}, "spec.mounts[0].target"),
        ({"mounts": [mount(target="/dev")]}, "spec.mounts[0].target"),
        ({"mounts": [mount(target="/a/../../etc")]}, "spec.mounts[0].target"),
        ({"mounts": [mount(target="/a\0b")]}, "spec.mounts[0]"),
        ({"mounts": [mount(), mount(target="/data/")]}, "spec.mounts[1].target"),
        ({"mounts": [mount(kind="bind", source="relative")]}, "spec.mounts[0].source"),
        ({"mounts": [mount(kind="bind", source="/a\0")]}, "spec.mounts[0]"),
        ({"mounts": [mount(source="../x")]}, "spec.mounts[0].source"),
        ({"mounts": [mount(source="Upper")]}, "spec.mounts[0].source"),
        ({"mounts": [mount(kind="tmpfs")]}, "spec.mounts[0].source"),
        ({"mounts": [mount(size_bytes=4096)]}, "spec.mounts[0].size_bytes"),
        ({"env": {"": "x"}}, "spec.env"),
        ({"env": {"A=B": "x"}}, "spec.env"),
        ({"env": {"A": "\0"}}, "spec.env"),
        ({"restart": {"policy": "always", "max_retries": 1}}, "spec.restart.max_retries"),
        ({"restart": {"policy": "always"}, "remove_on_exit": True}, "spec.restart.policy"),
        ({"stop_signal": "SIGNAL"}, "spec.stop_signal"),
        ({"network": "host", "hostname": "box"}, "spec.hostname"),
        ({"network": "host", "resources": {"net_send_bps": 1}}, "spec.resources.net_send_bps"),
        ({"network": "none", "resources": {"net_receive_bps": 1}}, "spec.resources.net_receive_bps"),
        ({"command": ["a", "b\0"]}, "spec.command"),
        ({"entrypoint": ["\0"]}, "spec.entrypoint"),
        ({"user": "\0"}, "spec.user"),
        ({"workdir": "/\0"}, "spec.workdir"),
    ],
)
def test_bad_specs(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(AlveoleError) as refused:
        check_spec(spec(**fields))
    assert refused.value.code is ErrorCode.INVALID
    assert refused.value.field == field


@pytest.mark.parametrize("name", ["SIGTERM", "TERM", "term", "15"])
def test_signals_by_name_and_number(name: str) -> None:
    assert signal_number(name) == signal.SIGTERM


@given(st.text(max_size=8) | st.integers().map(str))
def test_any_text_is_a_signal_or_refused(text: str) -> None:
    try:
        number = signal_number(text)
    except AlveoleError as error:
        if error.code is not ErrorCode.INVALID:
            raise
    else:
        assert 1 <= number <= signal.SIGRTMAX


@pytest.mark.parametrize("text", ["0", "65", "-1", "²", "", "SIG", "9" * 5000])
def test_what_is_no_signal(text: str) -> None:
    with pytest.raises(AlveoleError, match="not a signal"):
        signal_number(text)
