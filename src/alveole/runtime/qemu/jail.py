"""The jail of a machine: QEMU runs as an OCI container of its own, made by crun as any other.

It is an unprivileged user that no other process of the host is, in its own mount, process, IPC, network and cgroup
namespaces, without capabilities, behind crun's seccomp filter and QEMU's own. It sees the host's programs read-only
and, below PLACE, what is this machine's: nothing else.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alveole.host.cgroup import Cgroups
from alveole.host.mount import mount_tmpfs
from alveole.model.error import internal
from alveole.runtime.base import Capability, Cell, CellMount, Process
from alveole.runtime.crun import Crun
from alveole.runtime.oci import OciRuntime
from alveole.runtime.qemu.argv import (
    BINDS,
    DISKS,
    FIFOS,
    FILES,
    INITRAMFS,
    KERNEL,
    MEMORY,
    MONITOR,
    PLACE,
    Machine,
    command,
)
from alveole.runtime.qemu.boot import Boot

OVERHEAD_BYTES = 256 << 20
"""What QEMU may take beyond the guest's memory: its own, translated code, and buffers of disks and network."""

_PLACE_BYTES = 8 << 20  # what the guest can write there: status, console
_PROGRAMS = tuple(Path(name) for name in ("/usr", "/bin", "/lib", "/lib64"))
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
_DEVICES = (Path("/dev/net/tun"), Path("/dev/kvm"))
_THREADS = 256


class _Engine(Crun):
    name = "qemu"
    capabilities = frozenset({Capability.EXEC, Capability.ATTACH, Capability.PAUSE, Capability.MACHINE})


class Jail(OciRuntime):
    """Runs cells that ``jailed`` made."""

    def __init__(self, run_directory: Path, cgroups: Cgroups) -> None:
        super().__init__(_Engine(run_directory), cgroups)

    def _config(self, cell: Cell, kept: frozenset[str]) -> dict[str, Any]:
        """With the host's device nodes that QEMU opens; and a new network namespace, if the cell has none."""
        config = super()._config(cell, kept)
        linux = config["linux"]
        if cell.network_namespace is None:
            linux["namespaces"].append({"type": "network"})
        linux["devices"] = [_device(path) for path in _DEVICES if path.exists()]
        linux["resources"]["devices"] += [
            {"allow": True, "access": "rw", **{name: device[name] for name in ("type", "major", "minor")}}
            for device in linux["devices"]
        ]
        return config


def _device(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": str(path),
        "type": "c",
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": status.st_mode & 0o777,
        "uid": status.st_uid,
        "gid": status.st_gid,
    }


def user_of(cell: Cell) -> int:
    """The host's user and group id that QEMU runs as: of the instance's own range."""
    if cell.ids is None:
        raise internal(f"machine {cell.id} was given no id range")
    return cell.ids.base + 1


def make_root(directory: Path) -> Path:
    """The root directory of all jails: empty directories to mount on."""
    for name in ("dev", "proc", "sys", PLACE.lstrip("/"), *(str(path).lstrip("/") for path in _PROGRAMS)):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return directory


async def make_place(place: Path, user: int) -> None:
    """The machine's own files. QEMU may write those that are its own, and make none: a link would be followed."""
    place.mkdir(exist_ok=True)
    await mount_tmpfs(place, size_bytes=_PLACE_BYTES, mode=0o711)
    for name in FIFOS:
        os.mkfifo(place / name, mode=0o600)
        os.chown(place / name, user, user)
    for name in FILES:
        (place / name).touch(mode=0o600)
        os.chown(place / name, user, user)
    (place / MONITOR).mkdir(mode=0o700)
    os.chown(place / MONITOR, user, user)


@dataclass(frozen=True, slots=True, kw_only=True)
class Furniture:
    """What a jail holds."""

    root: Path  # made by ``make_root``
    place: Path  # made by ``make_place``
    boot: Boot
    memory: Path
    disks: Mapping[str, Path]  # by the name of the part that each is; "root" among them
    binds: Mapping[str, Path]


def jailed(cell: Cell, machine: Machine, furniture: Furniture, *, incoming: bool) -> Cell:
    """The cell that QEMU runs in."""
    user = user_of(cell)
    read_only = {part.name for part in machine.parts if part.read_only}
    own = (
        _mount(KERNEL, furniture.boot.kernel.image, read_only=True),
        _mount(INITRAMFS, furniture.boot.initramfs, read_only=True),
        _mount(MEMORY, furniture.memory, read_only=True),
        *(_mount(f"{DISKS}/{name}", path, read_only=name in read_only) for name, path in furniture.disks.items()),
        *(_mount(f"{BINDS}/{name}", path, read_only=name in read_only) for name, path in furniture.binds.items()),
    )
    programs = (CellMount(target=str(path), source=path, read_only=True) for path in _PROGRAMS if path.is_dir())
    return replace(
        cell,
        hostname=cell.id,
        process=Process(
            args=command(machine, incoming=incoming),
            env=_ENVIRONMENT,
            workdir="/",
            uid=user,
            gid=user,
            groups=_groups(machine.accelerator),
            tty=cell.process.tty,
            stdin=cell.process.stdin,
        ),
        root=furniture.root,
        read_only=True,
        mounts=(*programs, CellMount(target=PLACE, source=furniture.place), *own),
        ids=None,
        user_namespace=None,
        resources=cell.resources.replace(memory_bytes=(machine.memory_mib << 20) + OVERHEAD_BYTES, pids=_THREADS),
    )


def _mount(name: str, source: Path, *, read_only: bool) -> CellMount:
    return CellMount(target=f"{PLACE}/{name}", source=source, read_only=read_only)


def _groups(accelerator: str) -> tuple[int, ...]:
    """Whoever the host lets use KVM."""
    return (os.stat("/dev/kvm").st_gid,) if accelerator == "kvm" else ()  # noqa: PTH116  (of a device)
