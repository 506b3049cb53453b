"""Control groups: which hierarchies this host mounts, and whether they can hold instances to their limits."""

from dataclasses import dataclass
from pathlib import Path

from alveole.host.probe.finding import Finding, Status

UNIFIED_WANTED = frozenset({"cpu", "io", "memory", "pids"})
LEGACY_WANTED = frozenset({"blkio", "cpu", "devices", "freezer", "memory", "pids"})
_LEGACY_OPTIONS = frozenset({"rw", "ro", "xattr", "noprefix", "clone_children"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    unified: frozenset[str] | None  # controllers of the cgroup v2 hierarchy; None: it is not mounted
    legacy: frozenset[str]  # controllers mounted as cgroup v1

    @property
    def kind(self) -> str:
        if self.legacy:
            return "v1" if self.unified is None else "hybrid"
        return "none" if self.unified is None else "v2"


def cgroups() -> Finding:
    mountinfo = Path("/proc/self/mountinfo").read_text()
    unified = [mount for kind, mount, _ in _cgroup_mounts(mountinfo) if kind == "cgroup2"]
    controllers = Path(unified[0], "cgroup.controllers").read_text() if unified else None
    return judge(layout(mountinfo, controllers))


def layout(mountinfo: str, unified_controllers: str | None) -> Layout:
    """From /proc/self/mountinfo and the root's cgroup.controllers (None: no cgroup v2 is mounted)."""
    legacy = {
        option
        for kind, _, options in _cgroup_mounts(mountinfo)
        if kind == "cgroup"
        for option in options.split(",")
        if option not in _LEGACY_OPTIONS and "=" not in option
    }
    unified = None if unified_controllers is None else frozenset(unified_controllers.split())
    return Layout(unified=unified, legacy=frozenset(legacy))


def _cgroup_mounts(mountinfo: str) -> list[tuple[str, str, str]]:
    """(filesystem type, mount point, its options) of every hierarchy."""
    mounts = []
    for line in mountinfo.splitlines():
        place, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind in {"cgroup", "cgroup2"}:
            mounts.append((kind, place.split(" ")[4], options))
    return mounts


def judge(found: Layout) -> Finding:
    held = found.unified or frozenset() if found.kind == "v2" else found.legacy
    lacking = (UNIFIED_WANTED if found.kind == "v2" else LEGACY_WANTED) - held
    description = f"{found.kind}: {', '.join(sorted(held)) or 'no controllers'}"
    if found.kind == "none" or {"cpu", "memory", "pids"} & lacking:
        return Finding(
            name="cgroups",
            status=Status.MISSING,
            needed=True,
            found=description,
            means=f"instances cannot be held to their limits: no {', '.join(sorted(lacking))} controller",
            fix="mount cgroup v2 at /sys/fs/cgroup with all controllers (systemd's default); "
            "inside a container, give it a cgroup namespace it may write to",
        )
    if found.kind == "hybrid" and found.unified:
        return _blocking_hybrid(found.unified)
    if lacking:
        return Finding(
            name="cgroups",
            status=Status.WARN,
            needed=True,
            found=description,
            means=f"no {', '.join(sorted(lacking))} controller: the limits that need it are refused",
            fix="boot with systemd.unified_cgroup_hierarchy=1",
        )
    means = "limits are kept by the kernel" + ("" if found.kind == "v2" else "; v1 reports no pressure (PSI)")
    return Finding(name="cgroups", status=Status.OK, needed=True, found=description, means=means)


def _blocking_hybrid(controllers: frozenset[str]) -> Finding:
    commands = [
        f"mkdir -p /sys/fs/cgroup/{name} && mount -t cgroup -o {name} none /sys/fs/cgroup/{name}"
        for name in sorted(controllers)
    ]
    return Finding(
        name="cgroups",
        status=Status.MISSING,
        needed=True,
        found=f"hybrid, with {', '.join(sorted(controllers))} left to v2",
        means="crun refuses to start anything on a hybrid host whose v2 hierarchy has controllers",
        fix="mount them as v1 as well, or boot with systemd.unified_cgroup_hierarchy=1",
        command=" && ".join(commands),
    )
