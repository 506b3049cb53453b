"""The agent protocol: what flows between the control plane and the agent of a node.

The agent receives *assignments* (level-triggered: the whole record, not a change) and sends *reports*.
Types only, so that both sides depend on this module and never on each other.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Literal, Protocol

from pydantic import Field

from alveole.model.base import AnyMap, Record, StringMap
from alveole.model.image import ImageContent
from alveole.model.instance import Instance, InstanceStatus
from alveole.model.network import Network
from alveole.model.node import Node
from alveole.model.operation import Operation, Step
from alveole.model.snapshot import Snapshot
from alveole.model.template import Template
from alveole.model.volume import Volume


class InstanceAssignment(Record):
    """An instance this node must hold, with all the agent needs to hold it."""

    kind: Literal["instance"] = "instance"
    instance: Instance  # its image is pinned
    network: Network | None  # None for host and none
    volumes: tuple[Volume, ...] = ()


class Withdrawal(Record):
    """The node must no longer hold anything of this instance."""

    kind: Literal["withdrawal"] = "withdrawal"
    instance_id: str


class TaskAssignment(Record):
    """An operation that the agent carries out itself, such as image.pull. Carried out again after a crash."""

    kind: Literal["task"] = "task"
    operation: Operation


class Synced(Record):
    """All instances assigned now have been sent: what the node holds beyond them is a leftover."""

    kind: Literal["synced"] = "synced"
    volumes: tuple[Volume, ...] = ()  # volumes that exist
    snapshots: tuple[Snapshot, ...] = ()  # snapshots that exist
    complete: bool = True  # False: a newer version wrote records that this one cannot read, so nothing is a leftover


Assignment = InstanceAssignment | Withdrawal | TaskAssignment | Synced


class InstanceReport(Record):
    """The status of an instance, as observed under ``epoch``. A stale epoch or generation is refused."""

    project: str
    name: str
    instance_id: str
    epoch: int
    status: InstanceStatus
    removed: bool = False  # nothing of it is left on this node
    steps: tuple[Step, ...] = ()  # of the operation under way


class TaskReport(Record):
    """Progress or outcome of a task."""

    project: str
    operation_id: str
    steps: tuple[Step, ...] = ()
    progress: str = ""
    finished: bool = False
    result: AnyMap | None = None
    error: AnyMap | None = None


class AgentLink(Protocol):
    """The agent's end of the protocol."""

    async def register(self, node: Node) -> None:
        """Make the node known. Idempotent."""
        ...

    def assignments(self, node: str) -> AsyncIterator[Assignment]:
        """All assigned instances, then ``Synced``, then tasks under way, then each change, until cancelled.

        Tasks come last, since clearing away leftovers would remove what they have half made.
        """
        ...

    async def used_images(self) -> tuple[ImageContent, ...]:
        """Content that some image or instance refers to now: what the node must not collect."""
        ...

    async def report_instance(self, report: InstanceReport) -> None:
        """Write a status. Raises AlveoleError(CONFLICT) if the epoch is stale: withdraw the instance."""
        ...

    async def report_task(self, report: TaskReport) -> None:
        """Write progress or the outcome of a task. Raises AlveoleError(CANCELLED) if it was cancelled."""
        ...


TerminalSize = Annotated[int, Field(ge=0, le=65535)]
"""Rows or columns, as the kernel holds them."""


class ExecRequest(Record):
    """A command to run inside a running instance. Absent fields are as the instance's own process has them."""

    command: tuple[str, ...]
    env: StringMap = {}  # noqa: RUF012  (frozen by its validator)
    user: str | None = None
    workdir: str | None = None
    tty: bool = False
    stdin: bool = False
    rows: TerminalSize = 24
    columns: TerminalSize = 80


class Stream(Protocol):
    """Both directions of an exec or attach session."""

    async def write(self, data: bytes) -> None:
        """Send to the process's standard input; waits while the process does not read."""
        ...

    async def close_stdin(self) -> None: ...

    async def resize(self, rows: int, columns: int) -> None: ...

    def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks of (1 for stdout | 2 for stderr, data) until the process closes them. A tty has only stdout."""
        ...

    async def wait(self) -> int:
        """The exit code: 128 + N when killed by signal N. For attach: of the instance's process."""
        ...

    async def close(self) -> None:
        """Give up the session. An exec's process is killed; an attached instance goes on."""
        ...


class LogLine(Record):
    time: str  # RFC 3339
    stream: Literal["stdout", "stderr"]
    line: str
    partial: bool = False  # the line goes on in the next record


class InstanceStats(Record):
    """What an instance uses now. ``None``: this host cannot tell."""

    name: str
    cpu_s: float | None = None  # since its start
    memory_bytes: int | None = None  # charged to its cgroup, file cache given back on demand not counted
    memory_limit_bytes: int | None = None
    pss_bytes: int | None = None  # of its processes, shared pages divided by their users: own and shared
    own_bytes: int | None = None  # of that, what nobody else has: given back if the instance is removed
    shared_bytes: int | None = None  # of that, its part of what others have too
    pids: int | None = None
    received_bytes: int | None = None
    sent_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None


class Change(Record):
    """One path that differs from what the image holds."""

    kind: Literal["A", "C", "D"]  # added, changed, deleted
    path: str
    mode: int = 0  # st_mode: type and permissions; 0: deleted
    size_bytes: int = 0
    changed_ns: int = 0  # its time of modification, since the epoch


class Changes(Record):
    """What an instance wrote to its root. Volumes and shared directories are no part of that."""

    changes: tuple[Change, ...]
    complete: bool = True  # False: there are more


class NodeStreams(Protocol):
    """What the API asks of the agent that holds an instance, outside the level-triggered protocol."""

    async def exec(self, instance: Instance, request: ExecRequest) -> Stream: ...

    async def attach(self, instance: Instance) -> Stream:
        """Attach to the process of the instance; waits up to 10 s for an instance being created."""
        ...

    def logs(self, instance: Instance, *, follow: bool, tail: int | None, since: str | None) -> AsyncIterator[LogLine]:
        """Log lines, oldest first. With ``follow``, until the instance exits and is not going to be restarted."""
        ...

    async def stats(self, instance: Instance) -> InstanceStats: ...

    async def changes(self, instance: Instance) -> Changes:
        """Raises CONFLICT for a wall whose files the host does not look into."""
        ...

    async def snapshot_changes(self, snapshot: Snapshot) -> Changes:
        """Raises CONFLICT as ``changes``."""
        ...

    async def signal(self, instance: Instance, signal: int) -> None:
        """Send a signal to the instance's first process."""
        ...

    async def templates(self) -> tuple[Template, ...]:
        """Those of the node, by key."""
        ...
