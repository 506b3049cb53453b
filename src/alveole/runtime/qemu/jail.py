"""The jail of a machine: QEMU runs as an OCI container of its own, made by crun as any other.

It is an unprivileged user that no other process of the host is, in its own user, mount, process, IPC, network and
cgroup namespaces, without capabilities, behind crun's seccomp filter and QEMU's own. It sees the host's programs
read-only and, below PLACE, what is this machine's: nothing else.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alveole.host.cgroup import Cgroups
from alveole.host.mount import bind, mount_tmpfs, unmount_below
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
_TUN = Path("/dev/net/tun")
KVM = Path("/dev/kvm")
_THREADS = 256


class _Engine(Crun):
    name = "qemu"
    capabilities = frozenset(
        {
            Capability.EXEC,
            Capability.ATTACH,
            Capability.PAUSE,
            Capability.FORK,
            Capability.TEMPLATES,
            Capability.MACHINE,
        }
    )


class Jail(OciRuntime):
    """Runs cells that ``jailed`` made."""

    def __init__(self, run_directory: Path, cgroups: Cgroups) -> None:
        super().__init__(_Engine(run_directory), cgroups)

    def _config(self, cell: Cell, kept: frozenset[str]) -> dict[str, Any]:
        """With the device nodes that this QEMU opens; and a new network namespace, if the cell has none."""
        config = super()._config(cell, kept)
        linux = config["linux"]
        if cell.network_namespace is None:
            linux["namespaces"].append({"type": "network"})
        nodes = {_TUN: _TUN, **({KVM: self._kvm_node(cell)} if "kvm" in cell.process.args else {})}
        config["mounts"] += [_device(path, node) for path, node in nodes.items()]
        linux["resources"]["devices"] += [_rule(path) for path in nodes]
        return config

    def _kvm_node(self, cell: Cell) -> Path:
        """One of the machine's user: groups of the host, such as the one that may use KVM, are nobody inside."""
        node = cell.directory / "kvm"
        if not node.exists():
            os.mknod(node, 0o600 | stat.S_IFCHR, KVM.stat().st_rdev)
            os.chown(node, user_of(cell), user_of(cell))
        return node


def _device(path: Path, node: Path) -> dict[str, Any]:
    options = ["bind", "nosuid", "noexec"]
    return {"destination": str(path), "type": "bind", "source": str(node), "options": options}


def _rule(path: Path) -> dict[str, Any]:
    number = path.stat().st_rdev
    return {"allow": True, "type": "c", "major": os.major(number), "minor": os.minor(number), "access": "rw"}


def user_of(cell: Cell) -> int:
    """The host's user and group id that QEMU runs as: the first of the instance's own range, inside it user 0."""
    if cell.ids is None:
        raise internal(f"machine {cell.id} was given no id range")
    return cell.ids.base


def make_root(directory: Path) -> Path:
    """The root directory of all jails: empty directories to mount on."""
    for name in ("dev", "proc", "sys", PLACE.lstrip("/"), *(str(path).lstrip("/") for path in _PROGRAMS)):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Furniture:
    """What a jail holds."""

    root: Path  # made by ``make_root``
    place: Path  # made by ``make_place``
    boot: Boot | None  # None: its root disk boots by itself
    memory: Path
    disks: Mapping[str, Path]  # by the name of the part that each is; "root" among them
    binds: Mapping[str, Path]


def own_file(cell: Cell, name: str, source: Path) -> Path:
    """A name of its own for a file, such as what it maps as memory, which others may remove under theirs."""
    own = cell.directory / name
    own.unlink(missing_ok=True)
    own.hardlink_to(source)
    return own


async def make_place(furniture: Furniture, machine: Machine, user: int) -> None:
    """The machine's own files. QEMU may write those that are its own, and make none: a link would be followed."""
    place = furniture.place
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
    (place / DISKS).mkdir(mode=0o711)
    (place / BINDS).mkdir(mode=0o711)
    for name, (source, read_only) in _sources(furniture, machine).items():
        # By us, not by the engine: inside its user namespace it could not come near most of them.
        if source.is_dir():
            (place / name).mkdir()
        else:
            (place / name).touch()
        await bind(source, place / name, read_only=read_only, recursive=False)


async def remove_place(place: Path) -> None:
    """Nothing happens if it is not there."""
    await unmount_below(place)
    if place.exists():
        place.rmdir()


def _sources(furniture: Furniture, machine: Machine) -> dict[str, tuple[Path, bool]]:
    """What is mounted below the place: where from, and whether it cannot be written."""
    read_only = {part.name for part in machine.parts if part.read_only}
    boot = furniture.boot
    return {
        **({KERNEL: (boot.kernel.image, True), INITRAMFS: (boot.initramfs, True)} if boot else {}),
        MEMORY: (furniture.memory, True),
        **{f"{DISKS}/{name}": (path, name in read_only) for name, path in furniture.disks.items()},
        **{f"{BINDS}/{name}": (path, name in read_only) for name, path in furniture.binds.items()},
    }


def jailed(cell: Cell, machine: Machine, furniture: Furniture, *, incoming: bool) -> Cell:
    """The cell that QEMU runs in."""
    own = (
        CellMount(target=f"{PLACE}/{name}", source=furniture.place / name, read_only=read_only)
        for name, (_, read_only) in _sources(furniture, machine).items()
    )
    programs = (CellMount(target=str(path), source=path, read_only=True) for path in _PROGRAMS if path.is_dir())
    return replace(
        cell,
        hostname=cell.id,
        process=Process(
            args=command(machine, incoming=incoming),
            env=_ENVIRONMENT,
            workdir="/",
            uid=0,
            gid=0,
            tty=cell.process.tty,
            stdin=cell.process.stdin,
        ),
        root=furniture.root,
        read_only=True,
        mounts=(*programs, CellMount(target=PLACE, source=furniture.place), *own),
        resources=cell.resources.replace(memory_bytes=(machine.memory_mib << 20) + OVERHEAD_BYTES, pids=_THREADS),
    )
