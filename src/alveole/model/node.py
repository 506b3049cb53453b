"""A node: a host that runs an agent."""

from typing import Literal

from pydantic import Field

from alveole.model.base import AnyMap, Record, Timestamp


class Node(Record):
    """Key ``nodes/NAME``."""

    kind: Literal["node"] = "node"
    name: str
    cpus: int
    memory_bytes: int
    forks: tuple[str, ...] = ()  # isolations whose instances can be forked here
    plugs: tuple[str, ...] = ()  # isolations whose instances can be given volumes while they run here
    isolations: tuple[str, ...]  # the walls this host can run
    lacking: AnyMap = Field(default_factory=dict)  # isolation -> why this host cannot run it
    boot_id: str
    registered_at: Timestamp
