"""An image: a name in a project for an immutable, content-addressed set of layers and a configuration."""

from typing import Annotated, Literal

from pydantic import Field

from alveole.model.base import Name, Record, StringMap, Timestamp
from alveole.model.instance import HealthCheck


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


class ImageContent(Record):
    """What a node's image store holds for one manifest digest."""

    digest: str  # of the manifest, "sha256:..."
    layers: tuple[str, ...]  # diff ids, lowest first
    size_bytes: int  # compressed
    config: ImageConfig


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


class Recipe(Record):
    """How ``image build`` makes an image. Read from TOML."""

    base: str  # scratch | debian:SUITE | an image's name
    packages: tuple[str, ...] = ()
    files: tuple["RecipeFile", ...] = ()
    commands: tuple[str, ...] = ()
    env: StringMap = Field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    ports: tuple[Annotated[str, Field(pattern=r"^[0-9]{1,5}/(tcp|udp)$")], ...] = ()
    labels: StringMap = Field(default_factory=dict)
    stop_signal: str = ""
    health: HealthCheck | None = None


class RecipeFile(Record):
    """A file put into the image: from ``source`` (relative to the recipe, or absolute) or from ``content``."""

    target: Annotated[str, Field(pattern=r"^/")]
    source: str = ""
    content: str | None = None
    mode: Annotated[str, Field(pattern=r"^0?[0-7]{3,4}$")] = "0644"
    user: int = 0
    group: int = 0


Recipe.model_rebuild()
