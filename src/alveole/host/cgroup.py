"""Cgroups of instances, the same on a host with the v2 tree, with v1 hierarchies, or with both (hybrid).

The engines make an instance's cgroup and write its limits; here it is measured, frozen, killed and removed. A cgroup is
named by its path below each hierarchy's mount: "alveole-1a2b3c4d/0123456789ab".
"""

import asyncio
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from alveole.host import syscalls
from alveole.host.blocking import in_thread
from alveole.host.cgroup_usage import Usage, oom_kills_v1, oom_kills_v2, read_text, usage_v1, usage_v2
from alveole.host.identity import CLAIMS
from alveole.host.mountinfo import MountEntry, mounts
from alveole.model.error import AlveoleError, ErrorCode, conflict, unsupported

_WANTED = ("cpu", "io", "memory", "pids")  # v2 controllers that instances are limited by
_OUR_MOUNT = "alveole"  # source of the v1 hierarchies that we mounted, so that we know them again
_POLL_FIRST_S, _POLL_LAST_S = 0.001, 0.05
_END_TIMEOUT_S = 10.0
_NO_CONTROLLER = frozenset({"rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which hierarchies this host has. ``v1`` maps each controller, and "name=systemd" and the like, to its mount."""

    v2: Path | None = None
    v1: Mapping[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        if self.v2 and self.v1:
            return "hybrid"
        return "v2" if self.v2 else "v1"

    @property
    def mounts(self) -> tuple[Path, ...]:
        """One per hierarchy."""
        return tuple(dict.fromkeys([*([self.v2] if self.v2 else []), *self.v1.values()]))


def layout_of(entries: Iterable[MountEntry]) -> Layout:
    """Only mounts of whole hierarchies count: containers' views of a part are no place for ours."""
    v2: Path | None = None
    v1: dict[str, Path] = {}
    for entry in entries:
        if entry.root != "/":
            continue
        if entry.filesystem == "cgroup2":
            v2 = v2 or Path(entry.target)
        elif entry.filesystem == "cgroup":
            for option in entry.options:
                if option not in _NO_CONTROLLER and not option.startswith("release_agent="):
                    v1.setdefault(option, Path(entry.target))
    return Layout(v2=v2, v1=v1)


class Cgroups:
    """Every method is idempotent; a cgroup that does not exist has no processes and is removed."""

    def __init__(self, layout: Layout | None = None) -> None:
        """Without ``layout``, as this host has it."""
        self._read_from_host = layout is None
        self._layout = layout or layout_of(mounts())

    @property
    def layout(self) -> Layout:
        return self._layout

    def prepare(self, parent: str) -> None:
        """Make ``parent`` in every hierarchy, so that limits work in its children and crun accepts the host.

        Raises UNSUPPORTED if this host has no cgroups or does not let them be used.
        """
        with _host_lock():
            self._read_again()
            if not self._layout.mounts:
                raise unsupported("this host has no cgroups", hint="mount -t cgroup2 cgroup2 /sys/fs/cgroup")
            if self._layout.name == "hybrid":
                self._move_controllers_to_v1()
            for mount in self._layout.mounts:
                (mount / parent).mkdir(parents=True, exist_ok=True)
        if self._layout.v2:
            for directory in (self._layout.v2, self._layout.v2 / parent):
                _enable_controllers(directory)

    def _move_controllers_to_v1(self) -> None:
        """crun refuses a hybrid host whose v2 tree holds controllers: mount them as v1, which takes them out of it."""
        assert self._layout.v2  # noqa: S101  (hybrid means there is one)
        in_v2 = (self._layout.v2 / "cgroup.controllers").read_text().split()
        for controller in (*in_v2, *self._between()):
            target = self._layout.v2.parent / controller
            target.mkdir(exist_ok=True)
            try:
                _mount_v1(controller, target)
            except OSError as error:
                target.rmdir()
                raise unsupported(
                    f"cgroup controller {controller} is in the v2 tree while others are v1, which crun refuses",
                    hint="boot with systemd.unified_cgroup_hierarchy=1",
                ) from error
        self._read_again()

    def _between(self) -> list[str]:
        """Controllers of v1 hierarchies that nothing shows: after their unmount it takes the kernel a while to give
        them back to v2, and crun looks for them."""
        lines = (line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines())
        return [
            name
            for names in lines
            for name in names.split(",")
            if name and "=" not in name and name not in self._layout.v1
        ]

    def release(self, parent: str) -> None:
        """Remove an empty ``parent``, and the mounts that ``prepare`` added if no daemon on this host needs them."""
        with _host_lock():
            for mount in self._layout.mounts:
                _remove_tree(mount / parent)
            for entry in mounts():
                target = Path(entry.target)
                if entry.filesystem == "cgroup" and entry.source == _OUR_MOUNT and not _children(target):
                    syscalls.umount(target, syscalls.UMOUNT_NOFOLLOW)
                    target.rmdir()
            self._read_again()

    def _read_again(self) -> None:
        """Another daemon may have added or removed a hierarchy."""
        if self._read_from_host:
            self._layout = layout_of(mounts())

    def usage(self, cgroup: str) -> Usage:
        v1 = usage_v1(self._layout.v1, cgroup)
        return v1.or_else(usage_v2(self._layout.v2 / cgroup)) if self._layout.v2 else v1

    def oom_kills(self, cgroup: str) -> int:
        """How many of its processes the kernel killed for lack of memory."""
        if memory := self._layout.v1.get("memory"):
            return oom_kills_v1(memory / cgroup) or 0
        return (oom_kills_v2(self._layout.v2 / cgroup) if self._layout.v2 else 0) or 0

    def processes(self, cgroup: str) -> frozenset[int]:
        """Pids in it and below, in whichever hierarchy."""
        return frozenset().union(*(_pids_below(mount / cgroup) for mount in self._layout.mounts))

    async def kill(self, cgroup: str) -> None:
        """SIGKILL everything in it and below, faster than it can fork, and wait until it is empty.

        Raises TIMEOUT if the kernel does not let a process end.
        """
        await _until(lambda: self._kill_once(cgroup), f"processes of cgroup {cgroup} do not end")

    def _kill_once(self, cgroup: str) -> bool:
        """Whether there was nothing left to kill."""
        pids = self.processes(cgroup)
        killer = self._layout.v2 / cgroup / "cgroup.kill" if self._layout.v2 else None
        if killer and killer.exists() and pids <= _pids_below(killer.parent):
            _write(killer, "1")
        elif pids:
            self._write_freezer(cgroup, frozen=True)  # so that no fork escapes
            for pid in pids | self.processes(cgroup):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.thaw(cgroup)  # v1: a frozen process does not die
        return not pids

    async def freeze(self, cgroup: str) -> None:
        """Stop all its processes where they are. Raises TIMEOUT, undone, if one cannot be stopped."""
        try:
            await _until(lambda: self._freeze_once(cgroup), f"cgroup {cgroup} does not freeze")
        except BaseException:
            self.thaw(cgroup)
            raise

    def _freeze_once(self, cgroup: str) -> bool:
        """Whether all are frozen. v1 wants to be told again where the first time missed a process being forked."""
        self._write_freezer(cgroup, frozen=True)
        if mount := self._layout.v1.get("freezer"):
            return read_text(mount / cgroup / "freezer.state") in {None, "FROZEN\n"}
        if self._layout.v2:
            events = read_text(self._layout.v2 / cgroup / "cgroup.events")
            return events is None or "frozen 1" in events
        return True

    def thaw(self, cgroup: str) -> None:
        self._write_freezer(cgroup, frozen=False)

    def _write_freezer(self, cgroup: str, *, frozen: bool) -> None:
        if mount := self._layout.v1.get("freezer"):
            _write(mount / cgroup / "freezer.state", "FROZEN" if frozen else "THAWED")
        elif self._layout.v2:
            _write(self._layout.v2 / cgroup / "cgroup.freeze", "1" if frozen else "0")

    async def remove(self, cgroup: str) -> None:
        """Remove it with what is below, in all hierarchies. Raises CONFLICT if it has processes."""
        if pids := self.processes(cgroup):
            raise conflict(f"cgroup {cgroup} has {len(pids)} processes", hint="kill them first")
        trees = [mount / cgroup for mount in self._layout.mounts]
        # Busy for a moment after its last process ended.
        await _until(lambda: all(map(_remove_tree, trees)), f"cgroup {cgroup} stays busy")


def _mount_v1(controller: str, target: Path) -> None:
    """Asks again for a moment while the kernel is busy taking the controller from where it was."""
    for pause_s in (0.01, 0.05, 0.2, 0.5, 0.0):
        try:
            syscalls.mount(_OUR_MOUNT, target, "cgroup", 0, controller)
        except OSError as error:
            if error.errno != errno.EBUSY or not pause_s:
                raise
            time.sleep(pause_s)
        else:
            return


def _enable_controllers(directory: Path) -> None:
    """Let children of a v2 cgroup be limited."""
    available = (directory / "cgroup.controllers").read_text().split()
    control = directory / "cgroup.subtree_control"
    missing = [name for name in _WANTED if name in available and name not in control.read_text().split()]
    if not missing:
        return
    try:
        control.write_text(" ".join(f"+{name}" for name in missing))
    except OSError as error:
        raise unsupported(
            f"cgroup controllers {', '.join(missing)} cannot be enabled in {directory}: {error.strerror}",
            hint="run the daemon on the host itself, or move the processes in that cgroup to one below it",
        ) from error


def _tree(directory: Path) -> list[Path]:
    """It and all below, deepest first; empty if it does not exist."""
    return [Path(path) for path, _, _ in os.walk(directory, topdown=False)]


def _children(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir()]


def _pids_below(directory: Path) -> frozenset[int]:
    """Never 0, by which the kernel names processes of other pid namespaces: kill(0) would be our own group."""
    texts = (read_text(path / "cgroup.procs") or "" for path in _tree(directory))
    return frozenset(pid for text in texts for pid in map(int, text.split()) if pid > 0)


def _remove_tree(directory: Path) -> bool:
    """Whether it is gone now."""
    for path in _tree(directory):
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
    return True


def _write(file: Path, text: str) -> None:
    """To a control file; fine if its cgroup is gone."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    finally:
        os.close(descriptor)


async def _until(reached: Callable[[], bool], complaint: str) -> None:
    """Ask at once, then ever more seldom. Raises TIMEOUT with the complaint."""
    deadline, pause_s = time.monotonic() + _END_TIMEOUT_S, _POLL_FIRST_S
    while not await in_thread(reached):  # removing a cgroup may wait for the whole kernel
        if time.monotonic() > deadline:
            raise AlveoleError(ErrorCode.TIMEOUT, complaint, hint="the kernel log says if a disk or device hangs")
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_LAST_S)


@contextmanager
def _host_lock() -> Iterator[None]:
    """Hierarchies belong to all daemons of this host."""
    CLAIMS.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (CLAIMS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
