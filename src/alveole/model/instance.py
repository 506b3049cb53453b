"""An instance: a container, sandbox or vm. Users write the spec; the node's agent reports the status."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from alveole.model.base import AnyMap, Name, Record, StringMap, Timestamp
from alveole.model.health import Health, HealthCheck
from alveole.model.image import ImageContent


class Isolation(StrEnum):
    """The wall around an instance, spelled as users type it."""

    CONTAINER = "container"
    SANDBOX = "sandbox"
    VM = "vm"


class Port(Record):
    """A published port: what reaches ``host_address:host_port`` is sent to ``instance_port``."""

    host_address: str = "0.0.0.0"  # noqa: S104  (what publishing means)
    host_port: Annotated[int, Field(ge=1, le=65535)]
    instance_port: Annotated[int, Field(ge=1, le=65535)]
    protocol: Literal["tcp", "udp"] = "tcp"


class Mount(Record):
    """Something mounted into the instance.

    ``source`` is a volume name, an absolute host path, or empty for tmpfs.
    """

    kind: Literal["volume", "bind", "tmpfs"]
    source: str = ""
    target: Annotated[str, Field(pattern=r"^/")]
    read_only: bool = False
    size_bytes: Annotated[int, Field(ge=4096)] | None = None  # tmpfs only


class Resources(Record):
    """Limits. ``None`` means no limit."""

    memory_bytes: Annotated[int, Field(ge=4 << 20)] | None = None
    cpus: Annotated[float, Field(gt=0, le=4096)] | None = None
    pids: Annotated[int, Field(ge=1)] | None = 4096
    io_read_bps: Annotated[int, Field(ge=1)] | None = None
    io_write_bps: Annotated[int, Field(ge=1)] | None = None
    net_receive_bps: Annotated[int, Field(ge=1, le=1 << 40)] | None = None  # bytes a second; not for host and none
    net_send_bps: Annotated[int, Field(ge=1, le=1 << 40)] | None = None


class Restart(Record):
    """When an instance that exited is started again."""

    policy: Literal["no", "on-failure", "always", "unless-stopped"] = "no"
    max_retries: Annotated[int, Field(ge=0)] = 0  # on-failure only; 0 is without end


SshKey = Annotated[str, Field(pattern=r"^[a-z0-9@.-]+ [A-Za-z0-9+/=]+( [^\x00-\x1f]*)?$", max_length=16384)]
"""A public key, as a line of ``authorized_keys``: its type, the key in base64, and a comment."""


class Origin(Record):
    """What an instance began from: an instance at one moment. All that began from one moment were equal then."""

    instance: str  # its name then
    instance_id: str
    node: str  # that has it
    moment: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    memory: bool = True  # it goes on, memory and processes included; else it starts with the files of that moment
    snapshot: str = ""  # the snapshot that keeps the moment; empty: captured while the instance runs


class InstanceSpec(Record):
    """What the user wants. ``None`` means: as the image says."""

    image: Annotated[str, Field(min_length=1, max_length=512)]
    isolation: Isolation = Isolation.CONTAINER
    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None
    env: StringMap = Field(default_factory=dict)
    user: str | None = None
    workdir: Annotated[str, Field(pattern=r"^/")] | None = None
    hostname: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,62})$")] | None = None
    labels: StringMap = Field(default_factory=dict)
    tty: bool = False
    stdin: bool = False
    attach: bool = False  # start only once a client is attached (within 10 s), so that it misses no output
    network: str = "default"  # a network's name, or host | none
    inside_address: Literal["constant", "same"] = "constant"  # vm only: what a machine sees as its own address
    accelerator: Literal["", "kvm", "tcg"] = ""  # vm only: what runs its kernel's code; empty: as measured
    template: bool = True  # vm only: it goes on from a template; else it boots
    ports: tuple[Port, ...] = ()
    mounts: tuple[Mount, ...] = ()
    resources: Resources = Resources()
    restart: Restart = Restart()
    health: HealthCheck | None = None
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    read_only: bool = False
    remove_on_exit: bool = False
    stop_signal: str | None = None
    stop_grace_s: Annotated[float, Field(ge=0, le=3600)] | None = None  # None: 10 s; 60 s for an operating system
    user_data: Annotated[str, Field(max_length=65536)] = ""  # for cloud-init, of a whole operating system
    ssh_keys: Annotated[tuple[SshKey, ...], Field(max_length=64)] = ()  # that may log in to one
    pull: Literal["missing", "always", "never"] = "missing"


class Desired(StrEnum):
    """The state the user asked for last."""

    RUNNING = "running"
    STOPPED = "stopped"
    ASLEEP = "asleep"
    REMOVED = "removed"


class Phase(StrEnum):
    """What the node's agent last saw."""

    PENDING = "pending"  # not placed yet, or waiting for its image
    CREATING = "creating"
    RUNNING = "running"
    BACKOFF = "backoff"  # exited; will be started again at next_start_at
    EXITED = "exited"  # ran and ended, or was stopped
    CREATED = "created"  # never started
    ASLEEP = "asleep"  # its memory and processes are on disk; it goes on when started
    FAILED = "failed"  # could not be started; error says why


class Placement(Record):
    """Instance to node. A report with another epoch is refused."""

    node: str
    epoch: int


class InstanceStatus(Record):
    """What the agent observed. Written by reports only."""

    phase: Phase = Phase.PENDING
    observed_generation: int = 0
    run: int = 0  # the Instance.run this status belongs to
    pid: int | None = None
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    exit_code: int | None = None
    reason: str = ""  # exited | stopped | killed by SIGKILL | out of memory | monitor lost | host restarted | ...
    restarts: int = 0  # automatic ones since the user last started it
    next_start_at: Timestamp | None = None
    health: Health | None = None
    health_output: str = ""
    machine: AnyMap | None = None  # of a vm, as it was started last: its type, kernel, accelerator, template ...
    error: AnyMap | None = None  # code, message, hint


class Schedule(Record):
    """Snapshots that are taken of an instance by themselves, while it runs."""

    every_s: Annotated[float, Field(ge=10, le=366 * 24 * 3600)]
    keep: Annotated[int, Field(ge=1, le=1000)]  # so many; older ones are removed
    memory: bool = False


class Instance(Record):
    """The stored record, key ``projects/PROJECT/instances/NAME``."""

    kind: Literal["instance"] = "instance"
    id: str  # 12 hex digits, never reused; names every path and host object of the instance
    project: Name = "default"
    name: Name
    spec: InstanceSpec
    image: ImageContent | None = None  # pinned when its image is ready
    image_operation: str = ""  # the pull it waits for, until then
    created_at: Timestamp
    desired: Desired
    generation: int = 1  # grows with every change of spec, desired or run
    run: int = 0  # grows with each start or restart the user asks for
    renewal: int = 0  # grows whenever its files are to begin anew: from its image, or from a snapshot (origin)
    stop_grace_s: float | None = None  # of the stop under way; None: as the spec says
    force: bool = False  # removed without grace
    placement: Placement | None = None
    origin: Origin | None = None  # what it began from, if not from its image
    schedule: Schedule | None = None
    address: str = ""  # IPv4, without prefix; empty for host and none
    operation: str = ""  # the operation under way on it
    status: InstanceStatus = InstanceStatus()

    @property
    def is_system(self) -> bool:
        """Whether it runs a whole operating system from the disk of its image."""
        return self.image is not None and self.image.disk is not None
