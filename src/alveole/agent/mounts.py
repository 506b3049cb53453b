"""What an instance sees beside its root: volumes, host directories, and the files Alveole writes for it."""

import shutil
from contextlib import suppress
from pathlib import Path

from alveole.agent.engine import Engine
from alveole.agent.holders import Holder
from alveole.host import mount
from alveole.model.agent import InstanceAssignment
from alveole.model.error import invalid, not_found, unsupported
from alveole.model.instance import Mount
from alveole.model.volume import Volume
from alveole.network.base import Attachment
from alveole.runtime.base import COPIED_FILE_BYTES, Capability, CellMount


async def ensure_mounts(
    engine: Engine, assignment: InstanceAssignment, attachment: Attachment, *, shifted: bool
) -> tuple[CellMount, ...]:
    """Make everything the instance mounts ready on the host; it holds its volumes already.

    Raises INVALID if a bind source does not exist.
    """
    machine = _is_machine(engine, assignment)
    found = list(_write_files(engine, assignment, attachment))
    namespace = Path(attachment.user_namespace) if shifted else None
    for index, wanted in enumerate(assignment.instance.spec.mounts):
        if wanted.kind == "tmpfs":
            found.append(CellMount(target=wanted.target, source=None, size_bytes=wanted.size_bytes))
            continue
        if machine and wanted.kind == "volume":
            disk = await engine.volumes.ensure_disk(_volume(assignment, wanted))
            found.append(CellMount(target=wanted.target, source=disk, disk=True, read_only=wanted.read_only))
            continue
        source = await _source(engine, assignment, wanted)
        if machine and source.is_file():
            _require_copyable(source, wanted, assignment.instance.spec.isolation)
        if namespace is not None:
            place = engine.paths.volatile(assignment.instance.id) / "m" / str(index)
            await mount.bind_idmapped(source, place, namespace, read_only=wanted.read_only, recursive=False)
            source = place
        found.append(CellMount(target=wanted.target, source=source, read_only=wanted.read_only))
    return tuple(found)


def _require_copyable(file: Path, wanted: Mount, isolation: str) -> None:
    """A machine gets the content of a single file when it starts."""
    if not wanted.read_only:
        raise unsupported(
            f"a {isolation} gets a copy of the single file {file}: what it writes would be lost",
            hint="mount it read-only (:ro), or the directory that holds it",
        )
    if file.stat().st_size > COPIED_FILE_BYTES:
        raise unsupported(
            f"{file} is larger than the {COPIED_FILE_BYTES >> 20} MiB of a single file that a {isolation} can be given",
            hint="mount the directory that holds it",
        )


def hold_volumes(engine: Engine, assignment: InstanceAssignment) -> None:
    """Make the instance a holder of all its volumes.

    Raises CONFLICT if one cannot be shared with who has it, and then it holds none that it did not hold before.
    """
    instance, machine = assignment.instance, _is_machine(engine, assignment)
    names = [wanted.source for wanted in instance.spec.mounts if wanted.kind == "volume"]
    twice = next((name for name in names if names.count(name) > 1), None)
    if machine and twice is not None:
        raise invalid(
            f"volume {twice} is mounted twice: a {instance.spec.isolation} can have a disk once", field="spec.mounts"
        )
    holder = Holder(instance_id=instance.id, name=instance.name, is_machine=machine)
    engine.volume_holders.take(assignment.volumes, holder)


def _is_machine(engine: Engine, assignment: InstanceAssignment) -> bool:
    return Capability.MACHINE in engine.runtimes[assignment.instance.spec.isolation].capabilities


def _volume(assignment: InstanceAssignment, wanted: Mount) -> Volume:
    found = next((volume for volume in assignment.volumes if volume.name == wanted.source), None)
    if found is None:
        raise not_found(f"volume {wanted.source} does not exist")
    return found


async def _source(engine: Engine, assignment: InstanceAssignment, wanted: Mount) -> Path:
    if wanted.kind == "volume":
        return await engine.volumes.ensure_mounted(_volume(assignment, wanted))
    source = Path(wanted.source)
    if not source.exists():
        raise invalid(f"bind source {source} does not exist on this host", hint="create it first", field="spec.mounts")
    return source


async def unmount_all(engine: Engine, instance_id: str) -> None:
    """Unmount all of the instance and remove its run directory, which then holds a handful of small files."""
    volatile = engine.paths.volatile(instance_id)
    await mount.unmount_below(volatile)
    with suppress(FileNotFoundError):
        shutil.rmtree(volatile)


async def release_volumes(engine: Engine, instance_id: str, volume_ids: tuple[str, ...]) -> None:
    """Unmount its volumes, unless another instance holds them."""
    for volume_id in volume_ids:
        if engine.volume_holders.release(volume_id, instance_id):
            await engine.volumes.ensure_unmounted(volume_id)


def _write_files(engine: Engine, assignment: InstanceAssignment, attachment: Attachment) -> list[CellMount]:
    """resolv.conf, hosts and hostname, readable by every id, mounted over the image's."""
    instance = assignment.instance
    directory = engine.paths.volatile(instance.id) / "etc"
    directory.mkdir(parents=True, exist_ok=True)
    hostname = attachment.hostname
    hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    if address := attachment.card.address if attachment.card else attachment.address:
        hosts += f"{address}\t{hostname}\n"
    contents = {"resolv.conf": engine.network.resolv_conf(attachment), "hosts": hosts, "hostname": f"{hostname}\n"}
    covered = {wanted.target for wanted in instance.spec.mounts}
    found = []
    for name, text in contents.items():
        path = directory / name
        path.write_text(text)
        path.chmod(0o644)
        if f"/etc/{name}" not in covered:
            found.append(CellMount(target=f"/etc/{name}", source=path))
    return found
