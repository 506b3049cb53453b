"""What the agent works with: the drivers of this node, chosen by the composition root."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from alveole.agent.captures import Captures
from alveole.agent.holders import VolumeHolders
from alveole.agent.record import Paths
from alveole.agent.steps import FaultHook
from alveole.host.cgroup import Cgroups
from alveole.host.identity import Identity
from alveole.image.base import ImageStore
from alveole.model.agent import AgentLink
from alveole.model.clock import Clock
from alveole.model.node import Node
from alveole.network.base import NetworkDriver
from alveole.runtime.base import Runtime
from alveole.volume.base import VolumeDriver

PARALLEL_STARTS = 8
"""Instances made at one time: enough to keep the processors busy, few enough to keep each quick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    link: AgentLink
    node: Node
    identity: Identity
    paths: Paths
    clock: Clock
    runtimes: Mapping[str, Runtime]  # by isolation
    images: ImageStore
    network: NetworkDriver
    volumes: VolumeDriver
    cgroups: Cgroups
    fault: FaultHook
    captures: Captures = field(default_factory=Captures)
    files: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    """By instance id: held by who makes, replaces, copies or removes its files."""
    starts: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PARALLEL_STARTS))
    volume_holders: VolumeHolders = field(default_factory=VolumeHolders)
