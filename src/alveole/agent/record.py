"""What the agent itself remembers of an instance, beside it on disk: enough to adopt or remove it after a restart."""

import os
from pathlib import Path

from pydantic import ValidationError

from alveole.model.agent import InstanceAssignment
from alveole.model.base import Record
from alveole.model.instance import InstanceStatus, Phase
from alveole.network.base import Attachment
from alveole.runtime.base import Handle


class LocalRecord(Record):
    instance_id: str
    project: str
    name: str
    runtime: str
    status: InstanceStatus = InstanceStatus()
    attachment: Attachment | None = None
    ids_base: int = 0  # the id range its files carry; 0: none yet, or not shifted
    handle: Handle | None = None
    volumes: tuple[str, ...] = ()  # ids of the volumes it holds
    starting: bool = False  # being made, or started without that being remembered
    run: int = 0  # the Instance.run being made, or made last
    asleep: bool = False  # what it is lies in Paths.asleep
    renewal: int = 0  # the Instance.renewal that its files are of
    has_begun: bool = False  # it has run; a fork goes on from its origin only the first time
    restarts: int = 0  # automatic ones, the one being made included


class Paths:
    """Where the agent keeps things of an instance."""

    def __init__(self, state: Path, run: Path) -> None:
        self.instances = state / "instances"
        self.moments = state / "moments"
        self.snapshots = state / "snapshots"
        self.run = run / "i"  # short: Unix sockets lie below
        self.scratch = run / "l"

    def home(self, identifier: str) -> Path:
        return self.instances / identifier

    def snapshot(self, identifier: str) -> Path:
        return self.snapshots / identifier

    def record(self, identifier: str) -> Path:
        return self.home(identifier) / "local.json"

    def begun(self, identifier: str) -> Path:
        return self.home(identifier) / "begun"

    def upper(self, identifier: str) -> Path:
        return self.home(identifier) / "upper"

    def work(self, identifier: str) -> Path:
        return self.home(identifier) / "work"

    def runtime(self, identifier: str) -> Path:
        return self.home(identifier) / "runtime"

    def seed(self, identifier: str) -> Path:
        return self.home(identifier) / "seed"

    def origin(self, identifier: str) -> Path:
        """What a fork goes on from, until it has."""
        return self.home(identifier) / "origin"

    def asleep(self, identifier: str) -> Path:
        """What an instance is that sleeps."""
        return self.home(identifier) / "asleep"

    def log(self, identifier: str) -> Path:
        return self.home(identifier) / "log"

    def volatile(self, identifier: str) -> Path:
        """Gone after a reboot, with all below."""
        return self.run / identifier

    def root(self, identifier: str) -> Path:
        return self.volatile(identifier) / "root"

    def sockets(self, identifier: str) -> Path:
        return self.volatile(identifier) / "s"


def save(paths: Paths, record: LocalRecord) -> None:
    """Replace the record; killed at any point, the old or the new one can be read.

    Not by renaming over the old one: ext4 then waits for the disk, and nothing here must outlive a power loss that a
    reboot does not end anyway.
    """
    path = paths.record(record.instance_id)
    temporary = path.with_suffix(".new")
    temporary.write_bytes(record.to_json())
    path.unlink(missing_ok=True)
    temporary.rename(path)


def load(paths: Paths, identifier: str) -> LocalRecord | None:
    """The record; None if there is none or it was lost with the power."""
    path = paths.record(identifier)
    for candidate in (path, path.with_suffix(".new")):
        try:
            return LocalRecord.from_json(candidate.read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
    return None


def note_begun(paths: Paths, identifier: str, renewal: int) -> None:
    """Write down that an instance has run with the files of this renewal, so that not even a power cut that takes the
    record lets these files begin anew. Waits for the disk.
    """
    path = paths.begun(identifier)
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(str(renewal))
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def begun(paths: Paths, identifier: str) -> int | None:
    """The renewal that was noted; None if none was, as for an instance that began from its image and still does."""
    try:
        return int(paths.begun(identifier).read_text())
    except (FileNotFoundError, ValueError):
        return None


def blank(paths: Paths, identifier: str, assignment: InstanceAssignment | None) -> LocalRecord:
    """Of one that is new here, or whose record was lost: what its files tell is not begun anew."""
    instance = assignment.instance if assignment else None
    renewal = begun(paths, identifier)
    is_asleep = instance is not None and instance.status.phase is Phase.ASLEEP
    return LocalRecord(
        instance_id=identifier,
        project=instance.project if instance else "",
        name=instance.name if instance else "",
        runtime=instance.spec.isolation if instance else "",
        status=instance.status if instance else InstanceStatus(),
        volumes=tuple(volume.id for volume in assignment.volumes) if assignment else (),
        ids_base=ids_on_disk(paths, identifier),
        renewal=renewal or 0,
        has_begun=renewal is not None,
        asleep=is_asleep and paths.asleep(identifier).exists(),
    )


def load_all(paths: Paths) -> dict[str, LocalRecord | None]:
    """Every instance directory of this node."""
    if not paths.instances.is_dir():
        return {}
    return {entry.name: load(paths, entry.name) for entry in os.scandir(paths.instances) if entry.is_dir()}


def ids_on_disk(paths: Paths, identifier: str) -> int:
    """The id range that the instance's files carry, when the record of it was lost."""
    try:
        return paths.upper(identifier).stat().st_uid & ~0xFFFF
    except FileNotFoundError:
        return 0
