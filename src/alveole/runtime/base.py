"""The Runtime contract: how one instance runs on this host.

The agent prepares a :class:`Cell` (root filesystem, namespaces, mounts, limits) and hands it to the runtime of its
isolation. Nothing here or above compares an isolation's name: what a wall needs or can do is a :class:`Capability`.

Every method is idempotent, and every effect can be found again from the instance's directory alone, so that a daemon
killed at any point finishes or undoes what it began.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from alveole.model.agent import ExecRequest, Stream
from alveole.model.base import Record
from alveole.model.instance import Resources
from alveole.model.template import Template


class Capability(StrEnum):
    EXEC = "exec"
    ATTACH = "attach"
    PAUSE = "pause"
    ROOT_DIRECTORY = "root-directory"  # wants its root filesystem mounted at Cell.root
    USER_NAMESPACE = "user-namespace"  # its ids are shifted by Cell.ids; wants Cell.user_namespace
    HOST_NETWORK = "host-network"  # can share the host's network
    IO_LIMITS = "io-limits"  # its reads and writes reach the disk as its own, and so can be limited
    FORK = "fork"  # can be captured while it runs, and others go on from there: implements Capturing
    TEMPLATES = "templates"  # its instances go on from templates in place of booting: implements Templating
    MACHINE = "machine"  # has a kernel, disks and a network card of its own: wants Cell.root_disk and Cell.card


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    """Ids 0..size-1 inside are base..base+size-1 on the host."""

    base: int
    size: int = 65536


COPIED_FILE_BYTES = 1 << 20
"""The largest single file that a machine can be given: it gets the content, once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellMount:
    """A host path (already id-mapped where that is needed) or a tmpfs, seen at ``target`` inside."""

    target: str
    source: Path | None  # None: tmpfs
    read_only: bool = False
    size_bytes: int | None = None  # tmpfs
    disk: bool = False  # source is a raw disk with a filesystem, mounted nowhere: for machines only


class Card(Record):
    """The network card of a machine, and what its guest sets up on it. All of it is the same in every clone.

    The card is the other end of ``device``, a tap in the instance's network namespace.
    """

    device: str
    mac: str
    address: str  # of the guest, without prefix; its namespace rewrites it to the instance's address and back
    gateway: str  # reached through a permanent neighbour entry
    gateway_mac: str
    control_address: str  # of the guest too, reached from inside its namespace only
    control_gateway: str  # the namespace's end of that
    has_route: bool  # False: nothing but its namespace can be reached (network none)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    args: tuple[str, ...]
    env: Mapping[str, str]
    workdir: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    capabilities: tuple[str, ...] = ()  # "CAP_CHOWN"; all others are dropped
    tty: bool = False
    stdin: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Everything a runtime needs to make one instance. All paths exist when it is handed over."""

    id: str  # of the instance
    directory: Path  # persistent, the runtime's own: bundle, logs' metadata; removed by the agent after delete()
    run_directory: Path  # gone after a reboot: sockets, pid files; short enough for a Unix socket below it
    log_path: Path
    hostname: str
    process: Process
    root: Path | None
    read_only: bool
    mounts: tuple[CellMount, ...] = ()
    ids: Ids | None = None
    user_namespace: Path | None = None
    network_namespace: Path | None = None  # None: the host's
    cgroup: str = ""  # below each hierarchy's mount: "alveole-1a2b3c4d/0123456789ab"
    resources: Resources = field(default_factory=Resources)
    block_device: str = ""  # "major:minor" of the disk that holds root, if I/O limits are wanted
    root_disk: Path | None = None  # a machine's: raw, its own, holds an ext4 filesystem
    seed_disk: Path | None = None  # a machine's whose root disk is a whole operating system: what that is told
    card: Card | None = None  # a machine's
    template: bool = True  # a machine's: it goes on from a template instead of booting
    accelerator: str = ""  # a machine's: kvm | tcg; empty: as measured
    origin: Path | None = None  # what ``capture`` wrote: it goes on from there, as another instance
    woken: bool = False  # with origin: as the same one, which keeps all that tells it from others


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where and as whom a machine of no instance runs."""

    ids: Ids  # used by nobody else meanwhile
    user_namespace: Path | None  # of these ids
    cgroup: str  # parent of all instances'


class Handle(Record):
    """Small, stored, and enough to find the instance again after the daemon or the agent restarted."""

    runtime: str
    id: str
    directory: str
    run_directory: str
    cgroup: str
    pid: int  # of the instance's first process as the host sees it (for a sandbox: of its kernel)
    pid_started: int  # /proc/PID/stat field 22, so that a reused pid is not mistaken
    monitor_pid: int
    monitor_started: int
    tty: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How the first process ended. ``code`` is 128 + N when signal N killed it; None if nobody knows."""

    code: int | None
    reason: str  # exited | killed by SIGKILL | out of memory | monitor lost
    finished_at: float  # seconds since the epoch


class State(StrEnum):
    CREATED = "created"  # made, its process not started
    RUNNING = "running"
    EXITED = "exited"  # its process ended; wait() says how
    ABSENT = "absent"  # nothing of it is here (or it never came far enough to be found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    state: State
    handle: Handle | None


class Runtime(Protocol):
    """A wall. Errors are AlveoleError: INVALID when the spec cannot be run (command not found), INTERNAL with the
    engine's own last words otherwise."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> frozenset[Capability]: ...

    async def probe(self) -> str:
        """Empty if this host can run it, else what is lacking and the fix."""
        ...

    async def create(self, cell: Cell) -> Handle:
        """Make it, up to but without starting its process. On failure nothing is left."""
        ...

    async def start(self, handle: Handle) -> None: ...

    async def signal(self, handle: Handle, signal: int) -> None:
        """Send to its first process. Nothing happens if that has ended."""
        ...

    async def kill(self, handle: Handle) -> None:
        """SIGKILL every process in it, those that ignore signals too, and wait until all are gone."""
        ...

    async def wait(self, handle: Handle) -> Exit:
        """Wait for the first process to end. May be called again, and after a restart of the daemon."""
        ...

    async def delete(self, cell_id: str, directory: Path, run_directory: Path, cgroup: str) -> None:
        """Remove all that create() made, running or not, half made or not. Logs stay."""
        ...

    async def recover(self, cell_id: str, directory: Path, run_directory: Path) -> Recovered:
        """Find it again after a restart of the daemon or of the host."""
        ...

    async def exec(self, handle: Handle, request: ExecRequest, process: Process) -> Stream:
        """Run a command in it. ``process`` is the instance's own with the request applied: ids resolved."""
        ...

    async def attach(self, handle: Handle) -> Stream: ...

    async def pause(self, handle: Handle) -> None: ...

    async def resume(self, handle: Handle) -> None: ...

    async def rotate_logs(self, handle: Handle, log_path: Path) -> None:
        """Called after ``log_path`` was renamed away: go on in a new file."""
        ...


class Describing(Protocol):
    """What a Runtime with Capability.MACHINE can tell beyond."""

    def describe(self, handle: Handle) -> Mapping[str, Any]:
        """Type, accelerator, processor, memory and kernel of the machine. Reads a small file."""
        ...


class Plugging(Protocol):
    """What a Runtime with Capability.MACHINE can do beyond."""

    async def plug(self, handle: Handle, volume_id: str, disk: CellMount) -> None:
        """Mount a raw disk in a running instance. Raises AlveoleError if it cannot; then nothing has changed."""
        ...

    async def unplug(self, handle: Handle, volume_id: str) -> None:
        """Raises CONFLICT if the instance uses it; then nothing has changed."""
        ...

    async def flush(self, handle: Handle) -> None:
        """Let what its processes have written to files reach its disks, if its guest can be asked and does it soon."""
        ...


class Capturing(Protocol):
    """What a Runtime with Capability.FORK can do beyond."""

    async def capture(
        self, handle: Handle, directory: Path, while_still: Callable[[], Awaitable[None]], *, go_on: bool
    ) -> Mapping[str, Any]:
        """Write all that the instance is, but for its disks, into an empty directory; Cell.origin of others.

        ``while_still`` is awaited while it stands still, for copies of its disks. It goes on afterwards if ``go_on``,
        and whenever this fails. Returns what that took: still_s, private_bytes.
        """
        ...


class TemplatePool(Protocol):
    """The templates of one runtime on this host, by key. They can be removed and replaced at any time: nothing that
    goes on from one needs it by its name."""

    async def shown(self, running: Collection[Handle]) -> tuple[Template, ...]:
        """All of them, by key; how many of ``running`` share the memory of each."""
        ...

    async def remove(self, key: str) -> tuple[int, int]:
        """Bytes freed, and bytes that will be when the instances have ended that share its memory. Nothing happens if
        there is none."""
        ...

    async def refresh(self, key: str, workplace: Workplace, card: Card) -> None:
        """Make it afresh; ``card`` is any machine's. The old one serves until then, and stays if that fails.

        Raises NOT_FOUND if there is none, and CONFLICT if it is of versions that this host does not have any more.
        """
        ...


class Templating(Protocol):
    """What a Runtime with Capability.TEMPLATES can do beyond."""

    @property
    def templates(self) -> TemplatePool: ...
