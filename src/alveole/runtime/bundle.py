"""One cell -> one OCI runtime specification (config.json). A pure function: the same cell gives the same bundle."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alveole.model.instance import Resources
from alveole.runtime.base import Cell, CellMount, Process

_CPU_PERIOD_US = 100_000
_CPU_QUOTA_LEAST_US = 1_000  # the kernel's own
_OPEN_FILES = 1_048_576
_DEV_BYTES = 64 << 20

_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an engine wants written differently."""

    host_kernel: bool  # instances run on the host's kernel: seccomp, device rules and masks guard it
    read_only_option: str  # that makes a bind mount and all mounts below it read-only


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """What this host allows."""

    open_files: int  # hard limit of RLIMIT_NOFILE; asking for more fails
    swap_limit: bool  # the kernel can limit swap


def bundle(
    cell: Cell, engine: Engine, limits: HostLimits, seccomp: Mapping[str, Any], files: Collection[Path]
) -> dict[str, Any]:
    """The specification of ``cell``. ``seccomp`` is a fragment merged into it: rules, or an engine's compiled form.

    ``files`` are those sources of its mounts that are no directories.
    """
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": process(cell.process, limits),
        "root": {"path": str(cell.root), "readonly": cell.read_only},
        "hostname": cell.hostname,
        "mounts": [*_system_mounts(cell, engine), *(_mount(mount, engine, files) for mount in cell.mounts)],
        "linux": _linux(cell, engine, limits),
    }
    if engine.host_kernel:
        config["linux"] |= seccomp.get("linux", {})
        config["annotations"] = seccomp.get("annotations", {})
    return config


def process(wanted: Process, limits: HostLimits) -> dict[str, Any]:
    """The specification of a process: of an instance, or of one run in it later."""
    kept = list(wanted.capabilities)
    open_files = min(_OPEN_FILES, limits.open_files)
    return {
        "terminal": wanted.tty,
        "user": {"uid": wanted.uid, "gid": wanted.gid, "additionalGids": list(wanted.groups)},
        "args": list(wanted.args),
        "env": [f"{name}={value}" for name, value in wanted.env.items()],
        "cwd": wanted.workdir,
        "capabilities": {"bounding": kept, "effective": kept, "permitted": kept},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": open_files, "hard": open_files}],
        "noNewPrivileges": True,
    }


def _system_mounts(cell: Cell, engine: Engine) -> list[dict[str, Any]]:
    quiet = ["nosuid", "noexec", "nodev"]
    devices = ["nosuid", "strictatime", "mode=755", f"size={_DEV_BYTES}"]
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
    mounts = [
        _of("proc", "/proc", quiet),
        _of("tmpfs", "/dev", devices),
        _of("devpts", "/dev/pts", terminals),
        _of("tmpfs", "/dev/shm", [*quiet, "mode=1777", f"size={_DEV_BYTES}"]),  # noqa: S108  (a mount point inside)
        _of("mqueue", "/dev/mqueue", quiet),
        _sys(cell, engine),
    ]
    if engine.host_kernel:
        mounts.append(_of("cgroup", "/sys/fs/cgroup", [*quiet, "relatime", "ro"]))
    return mounts


def _sys(cell: Cell, engine: Engine) -> dict[str, Any]:
    """/sys, read-only. A user namespace that does not own the network cannot mount it: then the host's is bound."""
    if cell.user_namespace is None or cell.network_namespace is not None:
        return _of("sysfs", "/sys", ["nosuid", "noexec", "nodev", "ro"])
    options = ["rbind", "nosuid", "noexec", "nodev", engine.read_only_option]
    return {"destination": "/sys", "type": "bind", "source": "/sys", "options": options}


def _of(kind: str, target: str, options: list[str]) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": kind, "options": options}


def _mount(mount: CellMount, engine: Engine, files: Collection[Path]) -> dict[str, Any]:
    if mount.source is None:
        size = [] if mount.size_bytes is None else [f"size={mount.size_bytes}"]
        access = "ro" if mount.read_only else "rw"
        return _of("tmpfs", mount.target, ["nosuid", "noexec", "nodev", "mode=1777", *size, access])
    read_only = "ro" if mount.source in files else engine.read_only_option  # crun sets "rro" on directories only
    options = ["rbind", "rprivate", "nodev", read_only if mount.read_only else "rw"]
    return {"destination": mount.target, "type": "bind", "source": str(mount.source), "options": options}


def _linux(cell: Cell, engine: Engine, limits: HostLimits) -> dict[str, Any]:
    linux: dict[str, Any] = {
        "namespaces": _namespaces(cell, engine),
        "resources": _resources(cell.resources, cell.block_device, limits),
        "cgroupsPath": f"/{cell.cgroup}",
        "rootfsPropagation": "private",
    }
    if engine.host_kernel:
        linux["resources"]["devices"] = [{"allow": False, "access": "rwm"}]
        linux["maskedPaths"] = list(_MASKED)
        linux["readonlyPaths"] = list(_READ_ONLY)
    if cell.ids:
        mapping = [{"containerID": 0, "hostID": cell.ids.base, "size": cell.ids.size}]
        linux |= {"uidMappings": mapping, "gidMappings": mapping}
    return linux


def _namespaces(cell: Cell, engine: Engine) -> list[dict[str, str]]:
    kinds = ["pid", "ipc", "uts", "mount", *(["cgroup"] if engine.host_kernel else [])]
    return [
        *({"type": kind} for kind in kinds),
        *_by_path("user", cell.user_namespace),
        *_by_path("network", cell.network_namespace),
    ]


def _by_path(kind: str, path: Path | None) -> list[dict[str, str]]:
    """One made ahead; left out, the instance shares the host's."""
    return [] if path is None else [{"type": kind, "path": str(path)}]


def _resources(wanted: Resources, block_device: str, limits: HostLimits) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if wanted.memory_bytes is not None:
        resources["memory"] = {"limit": wanted.memory_bytes}
        if limits.swap_limit:
            resources["memory"]["swap"] = wanted.memory_bytes  # of memory and swap together: no swap
    if wanted.cpus is not None:
        quota_us = max(_CPU_QUOTA_LEAST_US, round(wanted.cpus * _CPU_PERIOD_US))
        resources["cpu"] = {"quota": quota_us, "period": _CPU_PERIOD_US}
    if wanted.pids is not None:
        resources["pids"] = {"limit": wanted.pids}
    if block_device and (rates := _io_rates(wanted, block_device)):
        resources["blockIO"] = rates
    return resources


def _io_rates(wanted: Resources, block_device: str) -> dict[str, Any]:
    major, minor = map(int, block_device.split(":"))
    rates = {"throttleReadBpsDevice": wanted.io_read_bps, "throttleWriteBpsDevice": wanted.io_write_bps}
    return {name: [{"major": major, "minor": minor, "rate": rate}] for name, rate in rates.items() if rate is not None}
