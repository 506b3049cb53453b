"""Reading and writing OCI image documents: pure functions on hostile JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alveole.model.error import AlveoleError, invalid
from alveole.model.health import HealthCheck
from alveole.model.image import ImageConfig

DOCUMENT_LIMIT_BYTES = 4 << 20
MAX_LAYERS = 127  # as Docker; and about what an overlay takes

_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPES = {"": "application/vnd.oci.image.layer.v1.tar"} | {
    compression: f"application/vnd.oci.image.layer.v1.tar+{compression}" for compression in ("gzip", "zstd")
}
_NS_PER_S = 1_000_000_000

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Document(BaseModel):
    """Unknown fields are ignored, and null means absent, as writers in Go produce it."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Descriptor(_Document):
    media_type: Annotated[str, Field(alias="mediaType")] = ""
    digest: Digest
    size: Annotated[int, Field(ge=0)]


class Index(_Document):
    manifests: tuple[Descriptor, ...]


class Manifest(_Document):
    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], Field(max_length=MAX_LAYERS)] = ()

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        return (self.config, *self.layers)


class _Health(_Document):
    test: Annotated[tuple[str, ...] | None, Field(alias="Test")] = None
    interval_ns: Annotated[int | None, Field(alias="Interval")] = None
    timeout_ns: Annotated[int | None, Field(alias="Timeout")] = None
    start_period_ns: Annotated[int | None, Field(alias="StartPeriod")] = None
    retries: Annotated[int | None, Field(alias="Retries")] = None


class _Run(_Document):
    entrypoint: Annotated[tuple[str, ...] | None, Field(alias="Entrypoint")] = None
    command: Annotated[tuple[str, ...] | None, Field(alias="Cmd")] = None
    env: Annotated[tuple[str, ...] | None, Field(alias="Env")] = None
    workdir: Annotated[str | None, Field(alias="WorkingDir")] = None
    user: Annotated[str | None, Field(alias="User")] = None
    ports: Annotated[Mapping[str, Any] | None, Field(alias="ExposedPorts")] = None
    volumes: Annotated[Mapping[str, Any] | None, Field(alias="Volumes")] = None
    labels: Annotated[Mapping[str, str] | None, Field(alias="Labels")] = None
    stop_signal: Annotated[str | None, Field(alias="StopSignal")] = None
    health: Annotated[_Health | None, Field(alias="Healthcheck")] = None


class _Rootfs(_Document):
    diff_ids: tuple[Digest, ...] | None = None


class _Config(_Document):
    architecture: str = ""
    os: str = ""
    config: _Run | None = None
    rootfs: _Rootfs


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """An image's configuration document as Alveole understands it."""

    config: ImageConfig
    os: str
    diff_ids: tuple[str, ...]


def parse_index(data: bytes) -> Index:
    return _parse(Index, data, "index")


def parse_manifest(data: bytes) -> Manifest:
    return _parse(Manifest, data, "manifest")


def parse_configuration(data: bytes) -> Configuration:
    """Raises AlveoleError(INVALID) if it is no image configuration."""
    document = _parse(_Config, data, "configuration")
    try:
        config = _image_config(document)
    except ValidationError as error:
        raise _malformed("configuration", error) from error
    return Configuration(config=config, os=document.os, diff_ids=document.rootfs.diff_ids or ())


def make_configuration(config: ImageConfig, layers: Sequence[str]) -> bytes:
    """The document for ``layers`` (diff ids, lowest first). The same input gives the same bytes."""
    return _json(
        {
            "architecture": config.architecture,
            "os": "linux",
            "config": {key: value for key, value in _run(config).items() if value},
            "rootfs": {"type": "layers", "diff_ids": list(layers)},
        }
    )


def make_manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "config": config.model_dump(by_alias=True),
            "layers": [layer.model_dump(by_alias=True) for layer in layers],
        }
    )


def config_descriptor(digest: str, size: int) -> Descriptor:
    return Descriptor(mediaType=_CONFIG_TYPE, digest=digest, size=size)


def layer_descriptor(digest: str, size: int, compression: str) -> Descriptor:
    return Descriptor(mediaType=_LAYER_TYPES[compression], digest=digest, size=size)


def _image_config(document: _Config) -> ImageConfig:
    run = document.config or _Run()
    return ImageConfig(
        entrypoint=run.entrypoint or (),
        command=run.command or (),
        env=run.env or (),
        workdir="/" + (run.workdir or "").lstrip("/"),
        user=run.user or "",
        ports=tuple(sorted(port for name in run.ports or () if (port := _port(name)))),
        volumes=tuple(sorted(run.volumes or ())),
        labels=run.labels or {},
        stop_signal=run.stop_signal or "",
        health=_health(run.health),
        architecture=document.architecture,
    )


def _port(name: str) -> str:
    """``80`` means tcp. What is no port of ours (a range, sctp) only informs people, and is left out."""
    match = re.fullmatch(r"([0-9]{1,5})(/tcp|/udp)?", name)
    return f"{match[1]}{match[2] or '/tcp'}" if match else ""


def _health(health: _Health | None) -> HealthCheck | None:
    """Zero means the default, as Docker writes it."""
    test = (health.test if health else None) or ("NONE",)
    if health is None or len(test) < 2 or test[0] not in {"CMD", "CMD-SHELL"}:
        return None
    given = {
        "interval_s": _seconds(health.interval_ns),
        "timeout_s": _seconds(health.timeout_ns),
        "start_period_s": _seconds(health.start_period_ns),
        "retries": health.retries,
    }
    command = test[1:] if test[0] == "CMD" else ("/bin/sh", "-c", test[1])
    return HealthCheck.model_validate({"command": command} | {key: value for key, value in given.items() if value})


def _seconds(duration_ns: int | None) -> float:
    return max(duration_ns / _NS_PER_S, 0.1) if duration_ns else 0.0


def _run(config: ImageConfig) -> dict[str, Any]:
    health = config.health
    return {
        "Entrypoint": list(config.entrypoint),
        "Cmd": list(config.command),
        "Env": list(config.env),
        "WorkingDir": config.workdir,
        "User": config.user,
        "ExposedPorts": {port: {} for port in config.ports},
        "Volumes": {path: {} for path in config.volumes},
        "Labels": dict(config.labels),
        "StopSignal": config.stop_signal,
        "Healthcheck": {
            "Test": ["CMD", *health.command],
            "Interval": round(health.interval_s * _NS_PER_S),
            "Timeout": round(health.timeout_s * _NS_PER_S),
            "StartPeriod": round(health.start_period_s * _NS_PER_S),
            "Retries": health.retries,
        }
        if health
        else {},
    }


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


_Parsed = TypeVar("_Parsed", bound=_Document)


def _parse(kind: type[_Parsed], data: bytes, what: str) -> _Parsed:
    if b"\\u0000" in data:
        raise invalid(f"the image's {what} holds a NUL character")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _malformed(what, error) from error


def _malformed(what: str, error: ValidationError) -> AlveoleError:
    problem = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    return invalid(f"the image's {what} is malformed: {field}: {problem['msg']}".replace(": :", ":"))
