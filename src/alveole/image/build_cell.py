"""Runs a build step in a throw-away container over the layers so far, and makes a layer of what it changed."""

import json
import os
import resource
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alveole.host.blocking import in_thread
from alveole.host.cgroup import Cgroups
from alveole.host.identity import UID_WINDOW_SIZE, Identity
from alveole.host.lines import Followed, follow
from alveole.host.mount import IdShift, mount_overlay, unmount_below
from alveole.host.netlink import link_up
from alveole.host.netns import IDS_PER_RANGE, NETWORK_PIN, USER_PIN, NamespaceMaker, netlink_inside, remove_pins
from alveole.host.process import run
from alveole.image.base import Progress
from alveole.image.layer_tar import EXIT_REFUSED, Changes, Files
from alveole.model.error import internal, invalid
from alveole.model.instance import Resources
from alveole.runtime.base import Cell, CellMount, Ids, Process
from alveole.runtime.bundle import HostLimits, bundle
from alveole.runtime.crun import Crun
from alveole.runtime.seccomp import host_seccomp

STEP_TIMEOUT_S = 1800.0
TAR_TIMEOUT_S = 900.0
_PIDS = 4096
_DOCTOR = "alveole doctor says what this host lacks"
_NETWORK_FILES = ("resolv.conf", "hosts")  # of /etc

CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""What installing software needs, all of it within the build's user namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    args: tuple[str, ...]
    env: Mapping[str, str]
    network: bool  # the host's, or none
    mounts: tuple[CellMount, ...] = ()


class BuildCell:
    """A container below ``work``, a directory of ours that parents let others pass (mode 0711) and nobody else uses."""

    def __init__(self, work: Path, identity: Identity) -> None:
        self._work = work
        self._identity = identity
        self._cgroup = f"{identity.cgroup}/build"
        # The last range of the window: instances are given theirs from the first on.
        self._ids = Ids(base=identity.uid_base + UID_WINDOW_SIZE - IDS_PER_RANGE, size=IDS_PER_RANGE)

    @property
    def root_id(self) -> int:
        """The host's id of root inside."""
        return self._ids.base

    async def make(self) -> None:
        """Begin anew, whatever a killed daemon left here."""
        await self.remove()
        self._work.parent.mkdir(mode=0o711, exist_ok=True)
        self._work.mkdir(mode=0o711)

    async def remove(self) -> None:
        """No process, mount, namespace, cgroup or file remains."""
        await self._stop()
        await remove_tree(self._work)

    async def run(self, command: Command, layers: Sequence[Path], output: Path, on_line: Progress) -> Followed:
        """Run it over ``layers`` (lowest first) to its end; if it succeeds, write what it changed to ``output``.

        Raises AlveoleError: TIMEOUT after STEP_TIMEOUT_S, INTERNAL if the container cannot be made.
        """
        await self.make()
        try:
            mounts = (*command.mounts, *(self._network_mounts() if command.network else ()))
            config = self._config(command, mounts)
            (self._work / "config.json").write_text(json.dumps(config))
            await self._mount(layers, network=command.network)
            argv = ("crun", "--root", str(self._work / "crun"), "run", "--bundle", str(self._work), "build")
            ended = await follow(argv, timeout_s=STEP_TIMEOUT_S, on_line=on_line)
        finally:
            await self._stop()
        if ended.code == 0:
            upper, skip = str(self._work / "upper"), [mount["destination"] for mount in config["mounts"]]
            await write_tar(Changes(upper=upper, base=self._ids.base, size=self._ids.size, skip=skip), output)
        return ended

    @asynccontextmanager
    async def tree(self, layers: Sequence[Path]) -> AsyncIterator[Path]:
        """While inside, all of ``layers`` (lowest first) in one directory that may be changed, ids as in the image."""
        await self.make()
        self._work.chmod(0o700)  # what is set-user-ID in the image is so for the host's root here
        try:
            root, upper, work, scratch = (self._work / name for name in ("root", "upper", "overlay", "scratch"))
            await mount_overlay(root, layers, upper, work, shift=None, scratch=scratch)
            yield root
        finally:
            await self.remove()

    async def _mount(self, layers: Sequence[Path], *, network: bool) -> None:
        pins, maker = self._work / "ns", NamespaceMaker()
        try:
            await maker.make(pins, ids_base=self._ids.base, network=not network)
            if not network:
                await in_thread(partial(_loopback_up, pins / NETWORK_PIN))
        except OSError as error:
            raise internal(f"the build's namespaces cannot be made: {error}", hint=_DOCTOR) from error
        finally:
            await maker.close()
        shift = IdShift(base=self._ids.base, size=self._ids.size, user_namespace=pins / USER_PIN)
        upper, work, scratch = (self._work / name for name in ("upper", "overlay", "scratch"))
        await mount_overlay(self._work / "root", layers, upper, work, shift=shift, scratch=scratch)
        Cgroups().prepare(self._identity.cgroup)

    async def _stop(self) -> None:
        cgroups = Cgroups()
        await cgroups.kill(self._cgroup)
        await cgroups.remove(self._cgroup)
        remove_pins(self._work / "ns")
        await unmount_below(self._work)

    def _network_mounts(self) -> list[CellMount]:
        """Copies of the host's files, which may be links to where the container cannot look."""
        for name in _NETWORK_FILES:
            (self._work / name).write_bytes(Path("/etc", name).read_bytes())
        return [CellMount(target=f"/etc/{name}", source=self._work / name, read_only=True) for name in _NETWORK_FILES]

    def _config(self, command: Command, mounts: Sequence[CellMount]) -> dict[str, Any]:
        cell = Cell(
            id="build",
            directory=self._work,
            run_directory=self._work,
            log_path=self._work / "log",
            hostname="build",
            process=Process(args=command.args, env=command.env, workdir="/", uid=0, gid=0, capabilities=CAPABILITIES),
            root=self._work / "root",
            read_only=False,
            mounts=tuple(mounts),
            ids=self._ids,
            user_namespace=self._work / "ns" / USER_PIN,
            network_namespace=None if command.network else self._work / "ns" / NETWORK_PIN,
            cgroup=self._cgroup,
            resources=Resources(pids=_PIDS, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2),
        )
        limits = HostLimits(open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1], swap_limit=False)
        seccomp = {"linux": {"seccomp": host_seccomp(frozenset(CAPABILITIES))}}
        files = frozenset(self._work / name for name in _NETWORK_FILES)
        return bundle(cell, Crun.bundle, limits, seccomp, files)


def _loopback_up(network_namespace: Path) -> None:
    with netlink_inside(network_namespace) as netlink:
        netlink.send([link_up("lo")])


async def remove_tree(directory: Path) -> None:
    """Remove it with all it holds, in a process of its own. Fine if it does not exist."""
    await run(("rm", "-rf", "--one-file-system", "--", str(directory)), timeout_s=TAR_TIMEOUT_S)


async def write_tar(request: Changes | Files, output: Path) -> None:
    """Write a layer's tar in a process of its own. Raises AlveoleError(INVALID) if what it is to hold cannot be."""
    argv = (sys.executable, "-I", "-m", "alveole.image.layer_tar", str(os.getpid()), str(output))
    result = await run(argv, timeout_s=TAR_TIMEOUT_S, stdin=json.dumps(asdict(request)).encode(), check=False)
    if result.code == EXIT_REFUSED:
        raise invalid(result.stderr.decode(errors="replace").strip(), hint="correct the recipe")
    if result.code != 0:
        raise result.failure()
