"""A snapshot: what an instance was at one moment, kept until it is removed, whatever becomes of the instance."""

from typing import Literal

from alveole.model.base import Name, Record, Timestamp
from alveole.model.image import ImageContent
from alveole.model.instance import InstanceSpec
from alveole.model.volume import Volume


class Snapshot(Record):
    """Key ``projects/PROJECT/snapshots/NAME``. Its files, disks and volumes are all of the same moment."""

    kind: Literal["snapshot"] = "snapshot"
    id: str  # 12 hex digits; names its files
    project: Name = "default"
    name: Name
    instance: str  # its name then
    instance_id: str
    spec: InstanceSpec  # of the instance then
    image: ImageContent
    node: str  # where it is kept
    memory: bool = False  # whether memory and processes are kept too
    scheduled: bool = False  # taken by the instance's schedule, which removes it in time
    volumes: tuple[Volume, ...] = ()  # whose content is part of it
    phase: Literal["creating", "ready", "removing"] = "ready"
    created_at: Timestamp
    operation: str = ""
