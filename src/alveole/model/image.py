"""An image: a name in a project for an immutable, content-addressed set of layers and a configuration."""

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from alveole.model.base import Name, Record, StringMap, Timestamp
from alveole.model.health import HealthCheck


class ImageConfig(Record):
    """What an image says of how it is run: the part of the OCI image configuration that Alveole uses."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()  # "KEY=value"
    workdir: str = "/"
    user: str = ""
    ports: tuple[str, ...] = ()  # "80/tcp"
    volumes: tuple[str, ...] = ()  # paths the image wants kept apart
    labels: StringMap = Field(default_factory=dict)
    stop_signal: str = ""
    health: HealthCheck | None = None
    architecture: str = ""


DiskFormat = Literal["qcow2", "raw"]
"""Of a disk image as it was given. The store holds all of them raw."""


class DiskImage(Record):
    """The disk of a whole operating system: what an image holds in place of layers."""

    format: str  # a DiskFormat, of the file it was made from
    virtual_size_bytes: int  # as the system on it sees it


class ImageContent(Record):
    """What a node's image store holds for one digest: layers, or the disk of a machine."""

    digest: str  # "sha256:...", of the manifest, or of the file that the disk was made from
    layers: tuple[str, ...]  # diff ids, lowest first; none if it is a disk
    size_bytes: int  # of layers, compressed; of a disk, what it takes
    config: ImageConfig
    disk: DiskImage | None = None


class Image(Record):
    """Key ``projects/PROJECT/images/NAME``; NAME is a normalised reference with its tag, such as ``nginx:latest``."""

    kind: Literal["image"] = "image"
    project: Name = "default"
    name: Annotated[str, Field(min_length=1, max_length=512)]
    phase: Literal["pulling", "ready"] = "ready"
    content: ImageContent | None = None  # present when ready
    source: str = ""
    created_at: Timestamp
    operation: str = ""  # the operation that is fetching it


Package = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*[a-z0-9+](:[a-z0-9]+)?(=[A-Za-z0-9.+:~-]+)?$")]
"""As ``apt-get install`` takes it: ``name``, ``name:architecture``, ``name=version``. Not ``name-``, which removes."""


def _in_shell(command: object) -> object:
    return ("/bin/sh", "-c", command) if isinstance(command, str) else command


BuildCommand = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_in_shell)]
"""The arguments of a program; one string stands for a line run by ``/bin/sh -c``."""


class RecipeFile(Record):
    """Something put into the image: from ``source`` (relative to the recipe, or absolute) or from ``content``."""

    target: Annotated[str, Field(pattern=r"^/[^\x00-\x1f]+$", max_length=4096)]
    source: str = ""
    content: str | None = None
    mode: Annotated[str, Field(pattern=r"^([0-7]{3,4})?$")] = ""  # octal; empty: as the source, 0644 for content
    user: Annotated[int, Field(ge=0, le=65535)] = 0
    group: Annotated[int, Field(ge=0, le=65535)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if ".." in self.target.split("/") or ".." in self.source.split("/"):
            raise ValueError("'..' is not allowed in target or source")
        if not self.target.strip("/."):
            raise ValueError("target is the root directory itself; name something below it")
        if bool(self.source) == (self.content is not None):
            raise ValueError("give either source or content")
        return self


_OF_CONTAINERS = ("entrypoint", "command", "workdir", "user", "ports", "labels", "stop_signal", "health")
"""Fields of a recipe that say how a container of its image is run."""


class Recipe(Record):
    """How ``image build`` makes an image. Read from TOML."""

    base: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$", max_length=512)]
    """``scratch``, ``debian:SUITE`` (SUITE of letters, such as bookworm), or an image's name."""

    packages: tuple[Package, ...] = ()
    files: tuple[RecipeFile, ...] = ()
    commands: tuple[BuildCommand, ...] = ()
    network: Literal["none", "host"] = "none"  # what commands reach; packages are always fetched
    env: StringMap = Field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    workdir: Annotated[str, Field(pattern=r"^(/.*)?$")] = ""
    user: Annotated[str, Field(pattern=r"^([a-z_0-9][a-z0-9_.-]*(:[a-z_0-9][a-z0-9_.-]*)?)?$")] = ""
    ports: tuple[Annotated[str, Field(pattern=r"^[0-9]{1,5}/(tcp|udp)$")], ...] = ()
    labels: StringMap = Field(default_factory=dict)
    stop_signal: Annotated[str, Field(pattern=r"^((SIG)?[A-Z][A-Z0-9+-]*|[0-9]{1,2})?$")] = ""
    health: HealthCheck | None = None
    disk_mib: Annotated[int, Field(ge=512, le=(2 << 20) - 1)] | None = None
    """Size of the disk of a whole operating system that is made in place of layers; None: layers."""

    @property
    def suite(self) -> str:
        """The Debian suite it is made from; empty if its base is scratch or an image."""
        match = re.fullmatch(r"debian:([a-z]+)", self.base)
        return match[1] if match else ""

    @property
    def base_image(self) -> str:
        """The name of the image it is made from; empty if there is none."""
        return "" if self.suite or self.base == "scratch" else self.base

    @field_validator("env")
    @classmethod
    def _environment_names(cls, env: StringMap) -> StringMap:
        for name in env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
        return env

    @field_validator("ports")
    @classmethod
    def _port_range(cls, ports: tuple[str, ...]) -> tuple[str, ...]:
        for port in ports:
            if not 1 <= int(port.partition("/")[0]) <= 65535:
                raise ValueError(f"{port} is not between 1 and 65535")
        return ports

    @model_validator(mode="after")
    def _packages_need_a_base(self) -> Self:
        if self.packages and self.base == "scratch":
            raise ValueError("packages need a Debian base, not scratch")
        return self

    @model_validator(mode="after")
    def _a_disk_runs_itself(self) -> Self:
        if self.disk_mib is None:
            return self
        if not self.suite:
            raise ValueError(f"disk_mib needs a Debian base such as debian:bookworm, not {self.base}")
        for name in _OF_CONTAINERS:
            if getattr(self, name):
                raise ValueError(f"{name} has no meaning with disk_mib: what runs, its system decides; see commands")
        return self
