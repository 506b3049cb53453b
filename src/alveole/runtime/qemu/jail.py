"""The jail of a machine: QEMU runs as an OCI container of its own, made by crun as any other.

It is an unprivileged user that no other process of the host is, in its own mount, process, IPC, network and cgroup
namespaces, without capabilities, behind crun's seccomp filter and QEMU's own. It sees the host's programs read-only
and, below PLACE, what is this machine's: nothing else.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alveole.host.mount import mount_tmpfs
from alveole.model.error import internal
from alveole.runtime.base import Capability, Cell, CellMount, Process
from alveole.runtime.crun import Crun
from alveole.runtime.qemu.argv import (
    BINDS,
    DISKS,
    FIFOS,
    FILES,
    INITRAMFS,
    KERNEL,
    MEMORY,
    PLACE,
    Machine,
    command,
)
from alveole.runtime.qemu.boot import Boot
from alveole.runtime.qemu.seed import Plan

OVERHEAD_BYTES = 256 << 20
"""What QEMU may take beyond the guest's memory: its own, translated code, and buffers of disks and network."""

_PLACE_BYTES = 8 << 20  # what the guest can write there: status, console
_PROGRAMS = tuple(Path(name) for name in ("/usr", "/bin", "/lib", "/lib64"))
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
_THREADS = 256


class Jail(Crun):
    """crun, as the engine that QEMU runs under."""

    name = "qemu"
    capabilities = frozenset({Capability.EXEC, Capability.ATTACH, Capability.PAUSE, Capability.MACHINE})


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Furniture:
    """What a jail holds that is not of the cell."""

    root: Path  # made by ``make_root``
    place: Path  # made by ``make_place``
    boot: Boot
    memory: Path


def jailed(cell: Cell, machine: Machine, how: Plan, furniture: Furniture) -> Cell:
    """The cell that QEMU runs in."""
    user = user_of(cell)
    sources = {
        KERNEL: (furniture.boot.kernel.image, True),
        INITRAMFS: (furniture.boot.initramfs, True),
        MEMORY: (furniture.memory, True),
        f"{DISKS}/root": (cell.root_disk, cell.read_only),
        **{f"{DISKS}/{name}": (mount.source, mount.read_only) for name, mount in how.disks},
        **{f"{BINDS}/{name}": (mount.source, mount.read_only) for name, mount in how.binds},
    }
    own = (
        CellMount(target=f"{PLACE}/{name}", source=source, read_only=read_only)
        for name, (source, read_only) in sources.items()
    )
    programs = (CellMount(target=str(path), source=path, read_only=True) for path in _PROGRAMS if path.is_dir())
    return replace(
        cell,
        hostname=cell.id,
        process=Process(
            args=command(machine),
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


def _groups(accelerator: str) -> tuple[int, ...]:
    """Whoever the host lets use KVM."""
    return (os.stat("/dev/kvm").st_gid,) if accelerator == "kvm" else ()  # noqa: PTH116  (of a device)


def with_devices(config: dict[str, Any], accelerator: str) -> dict[str, Any]:
    """Add the host's device nodes that QEMU opens to a runtime specification."""
    numbers = {"/dev/net/tun": (10, 200), **({"/dev/kvm": (10, 232)} if accelerator == "kvm" else {})}
    allowed = [
        {"allow": True, "type": "c", "major": major, "minor": minor, "access": "rw"}
        for major, minor in numbers.values()
    ]
    linux = config["linux"]
    linux["resources"]["devices"] = [*linux["resources"]["devices"], *allowed]
    linux["devices"] = [
        {
            "path": path,
            "type": "c",
            "major": major,
            "minor": minor,
            "fileMode": os.stat(path).st_mode & 0o777,  # noqa: PTH116  (of a device)
            "uid": 0,
            "gid": os.stat(path).st_gid,  # noqa: PTH116  (of a device)
        }
        for path, (major, minor) in numbers.items()
    ]
    return config
