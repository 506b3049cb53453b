"""OCI documents: what Docker and others write is understood, and what an attacker writes is refused by name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.image.oci import (
    config_descriptor,
    layer_descriptor,
    make_configuration,
    make_manifest,
    parse_configuration,
    parse_index,
    parse_manifest,
)
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.health import HealthCheck
from alveole.model.image import ImageConfig

DIGEST = "sha256:" + "a" * 64

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
seconds = st.integers(1, 10_000).map(lambda tenths: tenths / 10)
configs = st.builds(
    ImageConfig,
    entrypoint=st.lists(words, max_size=3).map(tuple),
    command=st.lists(words, max_size=3).map(tuple),
    env=st.lists(words, max_size=3).map(tuple),
    workdir=words.map(lambda word: "/" + word.lstrip("/")),
    user=words,
    ports=st.sets(st.integers(1, 65535).map(lambda port: f"{port}/tcp")).map(sorted).map(tuple),
    volumes=st.sets(words).map(sorted).map(tuple),
    labels=st.dictionaries(words, words, max_size=3),
    stop_signal=st.sampled_from(["", "SIGQUIT"]),
    health=st.none()
    | st.builds(
        HealthCheck,
        command=st.lists(words, min_size=1, max_size=3).map(tuple),
        interval_s=seconds,
        timeout_s=seconds,
        start_period_s=seconds,
        retries=st.integers(1, 9),
    ),
    architecture=st.just("amd64"),
)


def document(config: object) -> bytes:
    return json.dumps(
        {"architecture": "arm64", "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": [DIGEST]}}
    ).encode()


@given(configs)
def test_written_configuration_reads_back(config: ImageConfig) -> None:
    parsed = parse_configuration(make_configuration(config, [DIGEST]))
    assert parsed.config == config
    assert parsed.diff_ids == (DIGEST,)
    assert parsed.os == "linux"


def test_configuration_as_docker_writes_it() -> None:
    """Null for what is absent, zero for default durations, nanoseconds, a shell's health check, relative workdir."""
    parsed = parse_configuration(
        document(
            {
                "Entrypoint": None,
                "Cmd": ["nginx", "-g", "daemon off;"],
                "Env": ["PATH=/bin"],
                "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "8080": {}, "9/sctp": {}},
                "Volumes": {"/data": {}},
                "WorkingDir": "srv",
                "Labels": None,
                "StopSignal": "SIGQUIT",
                "ArgsEscaped": True,
                "Healthcheck": {"Test": ["CMD-SHELL", "curl x"], "Interval": 5_000_000_000, "Timeout": 0, "Retries": 0},
            }
        )
    ).config
    assert parsed == ImageConfig(
        command=("nginx", "-g", "daemon off;"),
        env=("PATH=/bin",),
        ports=("53/udp", "80/tcp", "8080/tcp"),
        volumes=("/data",),
        workdir="/srv",
        stop_signal="SIGQUIT",
        health=HealthCheck(command=("/bin/sh", "-c", "curl x"), interval_s=5.0),
        architecture="arm64",
    )


@pytest.mark.parametrize("test", [None, [], ["NONE"], ["CMD"], ["CMD-SHELL"]])
def test_no_health_check(test: list[str] | None) -> None:
    assert parse_configuration(document({"Healthcheck": {"Test": test}})).config.health is None


def test_no_config_at_all() -> None:
    assert parse_configuration(document(None)).config == ImageConfig(architecture="arm64")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"Cmd": "sh -c"}, "config.Cmd"),
        ({"Env": [1]}, "config.Env.0"),
        ({"Labels": {"a": {}}}, "config.Labels.a"),
        ({"User": ["a"]}, "config.User"),
        ({"Cmd": ["a\0b"]}, "NUL"),
        ({"Healthcheck": {"Test": ["CMD", "x"], "Retries": -1}}, "retries"),
        ([], "config"),
    ],
)
def test_malformed_configuration_is_named(config: object, field: str) -> None:
    with pytest.raises(AlveoleError) as error:
        parse_configuration(document(config))
    assert error.value.code == ErrorCode.INVALID
    assert field in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"config": null}',
        json.dumps({"config": {"digest": "../../etc/shadow", "size": 1}, "layers": []}).encode(),
        json.dumps({"config": {"digest": DIGEST, "size": -1}, "layers": []}).encode(),
        json.dumps({"config": {"digest": DIGEST + "\n", "size": 1}, "layers": []}).encode(),
        json.dumps({"config": {"digest": DIGEST, "size": 1}, "layers": [{"digest": DIGEST, "size": 1}] * 200}).encode(),
    ],
)
@pytest.mark.parametrize("parse", [parse_manifest, parse_index, parse_configuration])
def test_hostile_documents_are_refused(parse: Any, data: bytes) -> None:
    with pytest.raises(AlveoleError) as error:
        parse(data)
    assert error.value.code == ErrorCode.INVALID


@given(st.lists(st.sampled_from(["", "gzip", "zstd"]), max_size=5))
def test_written_manifest_reads_back(compressions: list[str]) -> None:
    config = config_descriptor(DIGEST, 7)
    layers = tuple(layer_descriptor(DIGEST, size, compression) for size, compression in enumerate(compressions))
    manifest = parse_manifest(make_manifest(config, layers))
    assert (manifest.config, manifest.layers) == (config, layers)
    assert manifest.blobs == (config, *layers)
