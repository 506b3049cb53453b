"""Sandboxes with roots of their own, moments of them, and a network between them: for tests of captures."""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alveole.host import pidfd
from alveole.host.mount import mount_overlay
from alveole.runtime.base import Cell, Handle
from alveole.runtime.logfile import read_log
from alveole.runtime.runsc_capture import RunscRuntime
from tests.runtime_world import World

SECONDS = 60.0
STEP = "i=$((i+1)); echo $i; echo $i >&3; echo $i >/count; sleep 0.02"
COUNTING = ("sh", "-c", f"i=0; exec 3>/kept; trap 'exit 5' TERM; while :; do {STEP}; done")
SERVE = "echo hello >/index.html; busybox httpd -p 80 -h /; echo serves; "


@dataclass(kw_only=True)
class Box:
    """A running sandbox."""

    cell: Cell
    handle: Handle
    files: Path  # what it wrote: the upper directory of its root

    async def lines(self) -> list[str]:
        """What it has printed."""
        log = read_log(self.cell.log_path, follow=False, tail=None, since=None, finished=lambda: True)
        return [line.line async for line in log]

    async def counts(self) -> list[int]:
        return [int(line) for line in await self.lines()]


@dataclass(kw_only=True)
class Moment:
    """What a sandbox was."""

    directory: Path
    files: Path
    told: dict[str, Any] = field(default_factory=dict)


class Boxes:
    """Makes sandboxes, each with a root of its own: the image below, what it writes above."""

    def __init__(self, here: World) -> None:
        self.here = here
        runtime = here.reopen()
        assert isinstance(runtime, RunscRuntime)
        self.runtime = runtime
        self._made = 0

    async def start(self, *args: str, files: Path | None = None, **changes: Any) -> Box:
        box = await self.create(*args, files=files, **changes)
        await self.runtime.start(box.handle)
        return box

    async def create(self, *args: str, files: Path | None = None, **changes: Any) -> Box:
        cell, files = await self.cell(*args, files=files, **changes)
        return Box(cell=cell, handle=await self.runtime.create(cell), files=files)

    async def cell(self, *args: str, files: Path | None = None, **changes: Any) -> tuple[Cell, Path]:
        root, upper = await self.root(files)
        return self.here.cell(*(args or COUNTING), root=root, **changes), upper

    async def root(self, files: Path | None = None) -> tuple[Path, Path]:
        self._made += 1
        stem = self.here.directory / f"root{self._made}"
        upper, work, scratch = (stem.with_suffix(f".{name}") for name in ("upper", "work", "scratch"))
        if files is not None:
            copy(files, upper)
        assert self.here.root
        await mount_overlay(stem, [self.here.root], upper, work, shift=None, scratch=scratch)
        self.here.pins.append(stem)
        return stem, upper

    async def capture(
        self, box: Box, *, go_on: bool = True, also: Callable[[], Awaitable[None]] | None = None
    ) -> Moment:
        self._made += 1
        directory = self.here.directory / f"moment{self._made}"
        directory.mkdir()
        files = directory.with_suffix(".files")

        async def while_still() -> None:
            copy(box.files, files)
            if also is not None:
                await also()

        told = await self.runtime.capture(box.handle, directory, while_still, go_on=go_on)
        return Moment(directory=directory, files=files, told=dict(told))

    async def clone(self, moment: Moment, *args: str, **changes: Any) -> Box:
        return await self.start(*args, files=moment.files, origin=moment.directory, **changes)


def copy(files: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--reflink=auto", files, target], check=True)


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await reached():  # noqa: ASYNC110  (other processes are waited for)
            await asyncio.sleep(0.02)


async def goes_on(box: Box, by: int = 5) -> None:
    """It counts on from where it is."""
    before = len(await box.lines())

    async def reached() -> bool:
        return len(await box.lines()) >= before + by

    await until(reached)


def traces(here: World, cell: Cell) -> list[str]:
    """What is left of a cell on this host."""
    assert here.cgroups
    return [
        *(f"process {pid}" for pid, _ in pidfd.with_arguments(cell.id)),
        *(f"cgroup {mount / cell.cgroup}" for mount in here.cgroups.layout.mounts if (mount / cell.cgroup).exists()),
        *(str(path) for path in (*cell.directory.iterdir(), *cell.run_directory.iterdir())),
    ]


class Lab:
    """A network of its own, with a place for each sandbox."""

    def __init__(self, here: World) -> None:
        self._here = here
        self._places = 0
        self.namespace = self._namespace("lab")

    def _namespace(self, name: str) -> Path:
        pin = self._here.directory / name
        pin.touch()
        subprocess.run(["unshare", f"--net={pin}", "ip", "link", "set", "lo", "up"], check=True)
        self._here.pins.append(pin)
        return pin

    def place(self) -> tuple[Path, str]:
        """(network namespace, address)"""
        self._places += 1
        number = self._places
        pin, address = self._namespace(f"net{number}"), f"10.77.{number}.2"
        wire = (
            f"ip link add h{number} type veth peer name eth0 netns {pin} && ip address add 10.77.0.1/32 dev h{number} "
            f"&& ip link set h{number} up && ip route add {address} dev h{number}"
        )
        subprocess.run(["nsenter", f"--net={self.namespace}", "sh", "-c", wire], check=True)
        inside = (
            f"ip address add {address}/32 dev eth0 && ip link set eth0 up "
            "&& ip route add default via 10.77.0.1 dev eth0 onlink"
        )
        subprocess.run(["nsenter", f"--net={pin}", "sh", "-c", inside], check=True)
        return pin, address

    def get(self, address: str) -> str:
        """What is answered to a request from outside."""
        client = ["timeout", "10", "busybox", "wget", "-qO-", f"http://{address}/"]
        ran = subprocess.run(
            ["nsenter", f"--net={self.namespace}", *client], check=False, capture_output=True, text=True
        )
        return ran.stdout or ran.stderr

    def connect(self, address: str, port: int) -> subprocess.Popen[bytes]:
        client = ["nsenter", f"--net={self.namespace}", "busybox", "nc", address, str(port)]
        return subprocess.Popen(client, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def serves(box: Box, word: str = "serves") -> None:
    async def reached() -> bool:
        return word in await box.lines()

    await until(reached)


async def nothing() -> None:
    """While it stands still."""
