"""What an instance sees beside its root: volumes, host directories, and the files Alveole writes for it."""

import shutil
from contextlib import suppress
from pathlib import Path

from alveole.agent.engine import Engine
from alveole.host import mount
from alveole.model.agent import InstanceAssignment
from alveole.model.error import AlveoleError, ErrorCode, invalid
from alveole.model.instance import Mount
from alveole.network.base import Attachment
from alveole.runtime.base import CellMount


async def ensure_mounts(
    engine: Engine, assignment: InstanceAssignment, attachment: Attachment, *, shifted: bool
) -> tuple[CellMount, ...]:
    """Make everything the instance mounts ready on the host. Raises INVALID if a bind source does not exist."""
    found = list(_write_files(engine, assignment, attachment))
    namespace = Path(attachment.user_namespace) if shifted else None
    for index, wanted in enumerate(assignment.instance.spec.mounts):
        if wanted.kind == "tmpfs":
            found.append(CellMount(target=wanted.target, source=None, size_bytes=wanted.size_bytes))
            continue
        source = await _source(engine, assignment, wanted)
        if namespace is not None:
            place = engine.paths.volatile(assignment.instance.id) / "m" / str(index)
            await mount.bind_idmapped(source, place, namespace, read_only=wanted.read_only, recursive=False)
            source = place
        found.append(CellMount(target=wanted.target, source=source, read_only=wanted.read_only))
    return tuple(found)


async def _source(engine: Engine, assignment: InstanceAssignment, wanted: Mount) -> Path:
    if wanted.kind == "volume":
        volume = next((v for v in assignment.volumes if v.name == wanted.source), None)
        if volume is None:
            raise AlveoleError(ErrorCode.NOT_FOUND, f"volume {wanted.source} does not exist")
        engine.volume_holders.setdefault(volume.id, set()).add(assignment.instance.id)
        return await engine.volumes.ensure_mounted(volume)
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
        holders = engine.volume_holders.get(volume_id, set())
        holders.discard(instance_id)
        if not holders:
            engine.volume_holders.pop(volume_id, None)
            await engine.volumes.ensure_unmounted(volume_id)


def _write_files(engine: Engine, assignment: InstanceAssignment, attachment: Attachment) -> list[CellMount]:
    """resolv.conf, hosts and hostname, readable by every id, mounted over the image's."""
    instance = assignment.instance
    directory = engine.paths.volatile(instance.id) / "etc"
    directory.mkdir(parents=True, exist_ok=True)
    hostname = attachment.hostname
    hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    if attachment.address:
        hosts += f"{attachment.address}\t{hostname}\n"
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
