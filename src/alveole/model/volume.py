"""A volume: a disk with a filesystem, kept apart from any instance."""

from typing import Annotated, Literal

from pydantic import Field

from alveole.model.base import Name, Record, Timestamp


class Volume(Record):
    """Key ``projects/PROJECT/volumes/NAME``."""

    kind: Literal["volume"] = "volume"
    id: str  # 12 hex digits; names its file
    project: Name = "default"
    name: Name
    size_bytes: Annotated[int, Field(ge=16 << 20)]
    phase: Literal["creating", "ready", "removing"] = "ready"
    created_at: Timestamp
    operation: str = ""
