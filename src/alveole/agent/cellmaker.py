"""Making and unmaking what an instance runs in. Every function may be called again after it was cut short anywhere."""

import shutil
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from alveole.agent import snapshots
from alveole.agent.cell import build_cell, hostname_of, image_config
from alveole.agent.engine import Engine
from alveole.agent.mounts import ensure_mounts, release_volumes, unmount_all
from alveole.agent.record import LocalRecord
from alveole.agent.steps import StepLog
from alveole.agent.system import copy_disk, ensure_seed
from alveole.host import mount
from alveole.host.blocking import in_thread
from alveole.host.disk import disk_of
from alveole.host.process import run
from alveole.image.root_disk import make_root_disk
from alveole.model.agent import InstanceAssignment
from alveole.model.error import AlveoleError, ErrorCode, unsupported
from alveole.model.health import HealthCheck
from alveole.model.instance import Instance, Origin
from alveole.network.base import Attachment
from alveole.policy.system import check_no_system, check_system
from alveole.runtime.base import Capability, Capturing, CellMount, Handle, Ids
from alveole.volume.base import ROOT_DISK_BYTES

REMOVE_TIMEOUT_S = 600.0
_UNPACKED = 4  # so many times its compressed size an image takes at most, as a rule
_MODES = frozenset({"host", "none"})


async def make(
    engine: Engine, assignment: InstanceAssignment, record: LocalRecord, steps: StepLog
) -> AsyncIterator[LocalRecord]:
    """Everything up to the process, which is made but not started.

    Yields the record after each effect that must be remembered, before the next one begins.
    """
    instance = assignment.instance
    capabilities = engine.runtimes[instance.spec.isolation].capabilities
    _refuse_impossible(instance, capabilities)
    shifted, machine = Capability.USER_NAMESPACE in capabilities, Capability.MACHINE in capabilities
    engine.paths.home(instance.id).mkdir(parents=True, exist_ok=True, mode=0o711)
    engine.paths.volatile(instance.id).mkdir(parents=True, exist_ok=True, mode=0o711)
    record = record.replace(volumes=tuple(volume.id for volume in assignment.volumes))
    yield record
    with steps.step("image"):
        await _ensure_image(engine, instance)
    with steps.step("network"):
        # Also when it is attached already: a sandbox takes the address off its device, this puts it back.
        attachment = await _attach(engine, assignment, record.ids_base, shifted=shifted, machine=machine)
        record = record.replace(attachment=attachment, ids_base=attachment.ids_base)
        yield record
    origin = None
    if record.renewal < instance.renewal:
        with steps.step("renew"):
            await snapshots.begin_anew(engine, assignment, record)
        record = record.replace(renewal=instance.renewal, asleep=False, has_begun=False)
        yield record
    if record.asleep:
        origin = engine.paths.asleep(instance.id)
    elif instance.origin is not None and not record.has_begun:
        origin = await _ensure_origin(engine, instance, record.ids_base, steps)
    with steps.step("root"):
        if not instance.is_system:
            await _mount_root(engine, instance, attachment, shifted=shifted)
        root_disk = await _root_disk(engine, instance) if machine else None
    with steps.step("mounts"):
        seed_disk = await ensure_seed(engine, instance, attachment) if instance.is_system else None
        mounts: tuple[CellMount, ...] = ()
        if not instance.is_system:
            mounts = await ensure_mounts(engine, assignment, attachment, shifted=shifted or machine)
    with steps.step("create"):
        cell = build_cell(
            instance,
            paths=engine.paths,
            runtime=engine.runtimes[instance.spec.isolation],
            attachment=attachment,
            cgroup=cgroup_of(engine, instance.id),
            mounts=mounts,
            block_device=_block_device(engine, instance),
            root_disk=root_disk,
            origin=origin,
            seed_disk=seed_disk,
        )
        cell.directory.mkdir(parents=True, exist_ok=True)
        cell.run_directory.mkdir(parents=True, exist_ok=True)
        handle: Handle = await engine.runtimes[instance.spec.isolation].create(cell)
        yield record.replace(handle=handle)


async def _ensure_image(engine: Engine, instance: Instance) -> None:
    if instance.image is None or not await engine.images.has(instance.image):
        raise AlveoleError(
            ErrorCode.NOT_FOUND,
            f"the content of image {instance.spec.image} is not on node {engine.node.name}",
            hint=f"alveole image pull {instance.spec.image}",
        )


async def _ensure_origin(engine: Engine, instance: Instance, ids_base: int, steps: StepLog) -> Path | None:
    """Its own copy of what the instance it begins from was at that moment. None: it has no memory of it."""
    assert instance.origin is not None  # noqa: S101  (the caller has looked)
    if instance.origin.snapshot:  # it got all of it when its files began anew
        return engine.paths.origin(instance.id) if instance.origin.memory else None
    with steps.step("capture"):
        return await _take(engine, instance, instance.origin, ids_base)


async def _take(engine: Engine, instance: Instance, origin: Origin, ids_base: int) -> Path:
    return await engine.captures.take(
        engine.paths,
        engine.volumes,
        engine.runtimes[instance.spec.isolation],
        origin,
        instance.id,
        ids_base=ids_base,
        files=engine.files[origin.instance_id],
    )


async def prepare_asleep(engine: Engine, instance: Instance) -> None:
    """What a fork goes on from, as what sleeps has it. Its files get their range of ids when it wakes."""
    asleep = engine.paths.asleep(instance.id)
    if not asleep.exists():
        assert instance.origin is not None  # noqa: S101  (nothing else begins asleep)
        engine.paths.home(instance.id).mkdir(parents=True, exist_ok=True, mode=0o711)
        origin = await _take(engine, instance, instance.origin, 0)
        origin.rename(asleep)


async def put_to_sleep(engine: Engine, runtime: Capturing, handle: Handle) -> None:
    """Write what it is. It stands still afterwards, unless this fails."""
    asleep = engine.paths.asleep(handle.id)
    new = asleep.with_suffix(".new")
    for directory in (new, asleep):
        await in_thread(partial(shutil.rmtree, directory, ignore_errors=True))
    new.mkdir(mode=0o700)

    async def nothing() -> None:
        """Its disk stays its own."""

    try:
        await runtime.capture(handle, new, nothing, go_on=False)
        new.rename(asleep)
    except BaseException:
        await in_thread(partial(shutil.rmtree, new, ignore_errors=True))
        raise


async def forget_origin(engine: Engine, instance_id: str) -> None:
    """It goes on: the files are not needed any more; what it has mapped stays."""
    for directory in (engine.paths.origin(instance_id), engine.paths.asleep(instance_id)):
        if directory.exists():
            await in_thread(partial(shutil.rmtree, directory))


async def _attach(
    engine: Engine, assignment: InstanceAssignment, ids_base: int, *, shifted: bool, machine: bool
) -> Attachment:
    instance = assignment.instance
    mode = instance.spec.network
    return await engine.network.attach(
        instance_id=instance.id,
        project=instance.project,
        name=instance.name,
        hostname=hostname_of(instance),
        network=assignment.network,
        mode=mode if mode in _MODES else "network",
        address=instance.address,
        ports=instance.spec.ports,
        ids=Ids(base=ids_base) if ids_base else None,
        shifted=shifted or machine,
        machine=instance.spec.inside_address if machine else "",
        receive_bps=instance.spec.resources.net_receive_bps,
        send_bps=instance.spec.resources.net_send_bps,
    )


async def _root_disk(engine: Engine, instance: Instance) -> Path:
    """A copy of its image's disk, which is made when it is first wanted. What the instance writes is kept in it."""
    content = instance.image
    assert content is not None  # noqa: S101  (_ensure_image has looked)

    async def make(target: Path) -> None:
        if content.disk is not None:
            await copy_disk(engine, content, target)
        else:
            await make_root_disk(engine.images.layer_directories(content), target, ROOT_DISK_BYTES)

    key = content.digest.removeprefix("sha256:")
    need_bytes = content.size_bytes if content.disk is not None else _UNPACKED * content.size_bytes
    base = await engine.volumes.base_disk(key, make, need_bytes=need_bytes)
    return await engine.volumes.root_disk(instance.id, base)


async def _mount_root(engine: Engine, instance: Instance, attachment: Attachment, *, shifted: bool) -> None:
    assert instance.image is not None  # noqa: S101  (_ensure_image has looked)
    shift = None
    if shifted:
        ids = Ids(base=attachment.ids_base)
        shift = mount.IdShift(base=ids.base, size=ids.size, user_namespace=Path(attachment.user_namespace))
    await mount.mount_overlay(
        engine.paths.root(instance.id),
        engine.images.layer_directories(instance.image),
        engine.paths.upper(instance.id),
        engine.paths.work(instance.id),
        shift=shift,
        scratch=engine.paths.scratch / instance.id,
    )


def cgroup_of(engine: Engine, instance_id: str) -> str:
    return f"{engine.identity.cgroup}/{instance_id}"


def _refuse_impossible(instance: Instance, capabilities: frozenset[Capability]) -> None:
    """What this wall cannot do is refused by name, never left out in silence."""
    isolation = instance.spec.isolation
    if instance.is_system and Capability.MACHINE not in capabilities:
        raise unsupported(
            f"image {instance.spec.image} is the disk of a whole operating system, which a {isolation} cannot boot",
            hint="choose --isolation vm",
        )
    (check_system if instance.is_system else check_no_system)(instance.spec)
    if instance.spec.network == "host" and Capability.HOST_NETWORK not in capabilities:
        raise unsupported(
            f"a {isolation} cannot share the host's network", hint="publish its ports (-p), or choose another isolation"
        )
    if instance.spec.inside_address != "constant" and Capability.MACHINE not in capabilities:
        raise unsupported(
            f"a {isolation} always sees its own address", hint="leave out --inside-address, or choose isolation vm"
        )
    if (instance.spec.accelerator or not instance.spec.template) and Capability.MACHINE not in capabilities:
        raise unsupported(
            f"a {isolation} has no machine to accelerate or to boot",
            hint="leave out --accel and --no-template, or choose isolation vm",
        )
    if _limits_io(instance) and Capability.IO_LIMITS not in capabilities:
        raise unsupported(
            f"the disk I/O of a {isolation} cannot be limited",
            hint="leave out --io-read-bps and --io-write-bps, or choose another isolation",
        )


def _limits_io(instance: Instance) -> bool:
    resources = instance.spec.resources
    return resources.io_read_bps is not None or resources.io_write_bps is not None


def _block_device(engine: Engine, instance: Instance) -> str:
    return disk_of(engine.paths.upper(instance.id)) if _limits_io(instance) else ""


async def delete_runtime(engine: Engine, record: LocalRecord, steps: StepLog) -> None:
    """Remove what the runtime made, running or not. Which one that was may not be known any more."""
    paths, identifier = engine.paths, record.instance_id
    runtimes = [engine.runtimes[record.runtime]] if record.runtime else engine.runtimes.values()
    with steps.step("delete"):
        for runtime in runtimes:
            await runtime.delete(
                identifier, paths.runtime(identifier), paths.sockets(identifier), cgroup_of(engine, identifier)
            )


async def unmake(engine: Engine, record: LocalRecord, steps: StepLog) -> None:
    """Give back everything but the instance's files, logs and id range; and the volumes of one that sleeps, since it
    goes on with what it knows of them.
    """
    await delete_runtime(engine, record, steps)
    with steps.step("unmount"):
        await unmount_all(engine, record.instance_id)
    with steps.step("release"):
        await release_volumes(engine, record.instance_id, () if record.asleep else record.volumes)
    if record.attachment is not None:
        with steps.step("detach"):
            await engine.network.detach(record.attachment, keep_ids=record.ids_base != 0)


async def remove_files(engine: Engine, record: LocalRecord) -> None:
    """Remove the instance's files and logs, then free its id range. It must have been unmade."""
    home = engine.paths.home(record.instance_id)
    if home.exists():
        await run(["rm", "-rf", "--one-file-system", str(home)], timeout_s=REMOVE_TIMEOUT_S)
    runtime = engine.runtimes.get(record.runtime)
    if runtime is None or Capability.MACHINE in runtime.capabilities:
        await engine.volumes.remove_root_disk(record.instance_id)
    if record.ids_base:
        await engine.network.release_ids(Ids(base=record.ids_base))


def health_check(instance: Instance) -> HealthCheck | None:
    return instance.spec.health or image_config(instance).health


def stop_signal(instance: Instance) -> str:
    return image_config(instance).stop_signal
