"""Sandboxes captured while they run: they go on, and so do others from there, each on its own from then on."""

import asyncio
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from alveole.host import pidfd
from alveole.host.mount import mount_overlay
from alveole.model.agent import ExecRequest
from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.base import Cell, CellMount, Handle, State
from alveole.runtime.logfile import read_log
from alveole.runtime.runsc_capture import RunscRuntime
from tests.runtime_world import World, collect, delete, execute, process_of, world

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("runsc") is None, reason="runsc is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0
STEP = "i=$((i+1)); echo $i; echo $i >&3; echo $i >/count; sleep 0.02"
COUNTING = ("sh", "-c", f"i=0; exec 3>/kept; trap 'exit 5' TERM; while :; do {STEP}; done")


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world("runsc") as made:
        yield made


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


@pytest.fixture
def boxes(here: World) -> Boxes:
    return Boxes(here)


async def test_both_go_on_from_the_same_moment(boxes: Boxes) -> None:
    """Not a step is lost or done twice, in memory, in what is printed and in files."""
    original = await boxes.start()
    await goes_on(original)
    moment = await boxes.capture(original)
    clone = await boxes.clone(moment)
    await goes_on(clone)
    await goes_on(original)
    mine, other = await original.counts(), await clone.counts()
    assert mine == [*range(1, len(mine) + 1)]
    assert other == [*range(other[0], other[0] + len(other))]
    assert other[0] > 5
    assert int((moment.files / "count").read_text() or other[0] - 1) in {other[0] - 2, other[0] - 1}
    for box, last in ((original, mine[-1]), (clone, other[-1])):
        _, kept, _ = await execute(boxes.runtime, box.handle, "cat", "/kept")  # open all the time
        counted = [int(line) for line in kept.split()]
        assert counted == [*range(1, len(counted) + 1)]
        assert len(counted) >= last


async def test_a_clone_is_an_instance_like_any_other(boxes: Boxes) -> None:
    original = await boxes.start()
    await goes_on(original)
    clone = await boxes.clone(await boxes.capture(original))
    await goes_on(clone)
    runtime, cell = boxes.here.reopen(), clone.cell
    found = await runtime.recover(cell.id, cell.directory, cell.run_directory)
    assert (found.state, found.handle) == (State.RUNNING, clone.handle)
    assert await execute(runtime, clone.handle, "sh", "-c", "echo inside; exit 7") == (7, b"inside\n", b"")
    await runtime.pause(clone.handle)
    await runtime.resume(clone.handle)
    await runtime.signal(clone.handle, signal.SIGTERM)
    ended = await asyncio.wait_for(runtime.wait(clone.handle), SECONDS)
    assert (ended.code, ended.reason) == (5, "exited")
    await goes_on(original)
    await runtime.kill(original.handle)
    assert (await asyncio.wait_for(runtime.wait(original.handle), SECONDS)).code == 137


async def test_it_is_told_what_it_is_now(boxes: Boxes) -> None:
    """Host name and bound files are the clone's own; what it has in memory stays."""
    names = []
    for name in ("first", "second"):
        file = boxes.here.directory / name
        file.write_text(f"{name}\n")
        names.append(file)
    first, second = names
    mounts = (CellMount(target="/etc/hosts", source=first, read_only=True), CellMount(target="/tmp", source=None))
    original = await boxes.start(hostname="first", mounts=mounts)
    await execute(boxes.runtime, original.handle, "sh", "-c", "cat /etc/hosts; echo kept >/tmp/file")
    moment = await boxes.capture(original)
    mounts = (CellMount(target="/etc/hosts", source=second, read_only=True), CellMount(target="/tmp", source=None))
    clone = await boxes.clone(moment, hostname="second", mounts=mounts)
    told = {}
    for box in (original, clone):
        _, told[box.cell.hostname], _ = await execute(
            boxes.runtime, box.handle, "sh", "-c", "hostname; cat /etc/hosts /tmp/file"
        )
    assert told == {"first": b"first\nfirst\nkept\n", "second": b"second\nsecond\nkept\n"}


async def test_what_was_removed_stays_removed(boxes: Boxes) -> None:
    """A file of the image, and one below a directory that was replaced."""
    assert boxes.here.root
    (boxes.here.root / "tmp/below").touch()
    original = await boxes.start()
    script = "test -e /tmp/below && rm -r /tmp /bin/yes && busybox mkdir /tmp"
    assert (await execute(boxes.runtime, original.handle, "sh", "-c", script))[0] == 0
    clone = await boxes.clone(await boxes.capture(original))
    _, left, _ = await execute(boxes.runtime, clone.handle, "sh", "-c", "ls -d /tmp /tmp/* /bin/yes /bin/no*")
    assert left.split() == [b"/tmp"]


async def test_a_clone_of_a_clone(boxes: Boxes) -> None:
    box = await boxes.start()
    for number in range(3):
        await goes_on(box)
        moment = await boxes.capture(box)
        await goes_on(box)
        box = await boxes.clone(moment, hostname=f"clone{number}")
    await goes_on(box)
    counts = await box.counts()
    assert counts[0] > 15
    assert counts == [*range(counts[0], counts[0] + len(counts))]
    assert (await execute(boxes.runtime, box.handle, "hostname"))[1] == b"clone2\n"


async def test_two_captures_at_once_are_two_moments(boxes: Boxes) -> None:
    original = await boxes.start()
    await goes_on(original)
    moments = await asyncio.gather(*(boxes.capture(original) for _ in range(2)))
    firsts = []
    for moment in moments:
        clone = await boxes.clone(moment)
        await goes_on(clone)
        firsts.append((await clone.counts())[0])
    assert firsts[0] != firsts[1]
    await goes_on(original)


async def test_an_unprivileged_process_with_a_read_only_root(boxes: Boxes) -> None:
    script = "umask 077; i=0; while :; do i=$((i+1)); echo $i; echo $i >/tmp/count; sleep 0.02; done"
    shared = boxes.here.directory / "shared"
    shared.mkdir()
    os.chown(shared, 1000, 1000)
    changes: dict[str, Any] = {"read_only": True, "process": {"uid": 1000, "gid": 1000, "capabilities": ()}}
    mounts = (CellMount(target="/tmp", source=shared),)
    original = await boxes.start("sh", "-c", script, mounts=mounts, **changes)
    await goes_on(original)
    others = boxes.here.directory / "others"

    async def copy_shared() -> None:
        copy(shared, others)

    moment = await boxes.capture(original, also=copy_shared)
    mounts = (CellMount(target="/tmp", source=others),)
    clone = await boxes.clone(moment, "sh", "-c", script, mounts=mounts, hostname="clone", **changes)
    await goes_on(clone)
    _, told, _ = await execute(boxes.runtime, clone.handle, "sh", "-c", "hostname; id -u; touch /x", uid=1000, gid=1000)
    assert told == b"clone\n1000\n"
    counts = await clone.counts()
    assert counts == [*range(counts[0], counts[0] + len(counts))]
    assert counts[0] > 5


async def test_one_that_has_ended_cannot_be_captured(boxes: Boxes) -> None:
    box = await boxes.start("true")
    await boxes.runtime.wait(box.handle)
    with pytest.raises(AlveoleError) as caught:
        await boxes.capture(box)
    assert caught.value.code is ErrorCode.CONFLICT


async def test_what_is_asleep_wakes_where_it_was(boxes: Boxes) -> None:
    box = await boxes.start()
    await goes_on(box)
    moment = await boxes.capture(box, go_on=False)
    slept = await box.counts()
    await asyncio.sleep(0.3)
    assert await box.counts() == slept
    await delete(boxes.runtime, box.cell)
    handle = await boxes.runtime.create(replace(box.cell, origin=moment.directory))
    await boxes.runtime.start(handle)
    await goes_on(box)
    counts = await box.counts()
    assert counts == [*range(1, len(counts) + 1)]


# --- what goes wrong --------------------------------------------------------------------------------------------------


async def test_when_a_capture_fails_it_goes_on(boxes: Boxes) -> None:
    """Whichever part of it fails; and can be captured then."""
    original = await boxes.start()
    await goes_on(original)

    async def fail() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        await boxes.capture(original, also=fail)
    await goes_on(original)
    directory = boxes.here.directory / "taken"
    directory.mkdir()
    (directory / "checkpoint.img").touch()
    with pytest.raises(AlveoleError):
        await boxes.runtime.capture(original.handle, directory, nothing, go_on=False)
    await goes_on(original)
    clone = await boxes.clone(await boxes.capture(original))
    await goes_on(clone)
    counts = await original.counts()
    assert counts == [*range(1, len(counts) + 1)]


async def nothing() -> None:
    """While it stands still."""


async def test_a_full_disk_is_told_and_it_goes_on(boxes: Boxes) -> None:
    original = await boxes.start()
    await goes_on(original)
    small = boxes.here.directory / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], check=True)
    boxes.here.pins.append(small)
    with pytest.raises(AlveoleError) as caught:
        await boxes.runtime.capture(original.handle, small, nothing, go_on=True)
    assert caught.value.code is ErrorCode.EXHAUSTED
    await goes_on(original)


async def test_a_cancelled_capture_lets_it_go_on(boxes: Boxes) -> None:
    """Nothing of the engine's goes on behind the canceller's back."""
    original = await boxes.start()
    await goes_on(original)
    for delay_s in (0.0, 0.01, 0.03, 0.06, 0.1, 0.2):
        capturing = asyncio.ensure_future(boxes.capture(original, go_on=False))
        await asyncio.sleep(delay_s)
        capturing.cancel()
        with suppress(asyncio.CancelledError):
            await capturing
            break  # a quick host has captured it by then
        await goes_on(original, by=1)
        assert not [*pidfd.with_arguments("checkpoint", original.cell.id)]
    await delete(boxes.runtime, original.cell)


async def test_a_cancelled_start_leaves_what_delete_removes(boxes: Boxes) -> None:
    original = await boxes.start()
    await goes_on(original)
    moment = await boxes.capture(original)
    for delay_s in (0.0, 0.02, 0.05, 0.1, 0.15):
        clone = await boxes.create(files=moment.files, origin=moment.directory, hostname="clone")
        starting = asyncio.ensure_future(boxes.runtime.start(clone.handle))
        await asyncio.sleep(delay_s)
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
        await delete(boxes.runtime, clone.cell)
        assert not traces(boxes.here, clone.cell)
    await goes_on(original)


def traces(here: World, cell: Cell) -> list[str]:
    """What is left of a cell on this host."""
    assert here.cgroups
    return [
        *(f"process {pid}" for pid, _ in pidfd.with_arguments(cell.id)),
        *(f"cgroup {mount / cell.cgroup}" for mount in here.cgroups.layout.mounts if (mount / cell.cgroup).exists()),
        *(str(path) for path in (*cell.directory.iterdir(), *cell.run_directory.iterdir())),
    ]


async def test_other_mounts_are_refused_and_another_engine(boxes: Boxes) -> None:
    original = await boxes.start()
    await goes_on(original)
    moment = await boxes.capture(original)
    mounts = (CellMount(target="/more", source=boxes.here.directory),)
    with pytest.raises(AlveoleError) as caught:
        await boxes.clone(moment, mounts=mounts)
    assert caught.value.code is ErrorCode.CONFLICT
    about = moment.directory / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "engine": "an older one"}))
    with pytest.raises(AlveoleError, match="another version"):
        await boxes.clone(moment)


async def test_a_deleted_file_that_is_open_is_named(boxes: Boxes) -> None:
    script = "exec 5>/deleted; rm /deleted; while :; do echo 1; sleep 0.02; done"
    box = await boxes.start("sh", "-c", script)
    await goes_on(box)
    with pytest.raises(AlveoleError, match="deleted") as caught:
        await boxes.capture(box)
    assert caught.value.code is ErrorCode.CONFLICT
    await goes_on(box)


# --- commands, terminals, input ---------------------------------------------------------------------------------------


async def test_it_is_captured_between_two_commands(boxes: Boxes) -> None:
    """Commands that end soon, as of health checks, are waited for; those asked for meanwhile are run afterwards."""
    box = await boxes.start()
    await goes_on(box)
    script = "sleep 0.5; echo ended"
    first = await boxes.runtime.exec(box.handle, ExecRequest(command=("sh",)), process_of("sh", "-c", script))

    async def ask() -> None:
        assert (await execute(boxes.runtime, box.handle, "echo", "second"))[1] == b"second\n"

    capturing = asyncio.ensure_future(boxes.capture(box))
    await asyncio.sleep(0)
    asking = asyncio.ensure_future(ask())
    assert await asyncio.wait_for(collect(first), SECONDS) == (b"ended\n", b"")
    await first.close()
    clone = await boxes.clone(await capturing)
    await asking
    await goes_on(clone)


async def test_it_is_not_captured_while_a_command_runs_on(boxes: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alveole.runtime.runsc_capture._QUIET_TIMEOUT_S", 0.2)
    box = await boxes.start()
    await goes_on(box)
    command = await boxes.runtime.exec(box.handle, ExecRequest(command=("sleep",)), process_of("sleep", "1000"))
    with pytest.raises(AlveoleError, match="command") as caught:
        await boxes.capture(box)
    assert caught.value.code is ErrorCode.CONFLICT
    await command.close()
    await goes_on(await boxes.clone(await boxes.capture(box)))


@pytest.mark.parametrize(("output", "is_captured"), [("", False), (" >/tmp/output 2>&1 </dev/null", True)])
async def test_what_a_command_left_behind(boxes: Boxes, output: str, is_captured: bool) -> None:
    """It has the command's output open, which nothing can stand for in a clone. Without that, it ends in the clone."""
    box = await boxes.start()
    await goes_on(box)
    script = f"sleep 777{output} & echo begun"
    command = await boxes.runtime.exec(box.handle, ExecRequest(command=("sh",)), process_of("sh", "-c", script))
    async for _, data in command.output():
        if b"begun" in data:
            break
    await until_ended(boxes, box, "begun")
    await command.close()
    if is_captured:
        clone = await boxes.clone(await boxes.capture(box))
        await goes_on(clone)
        assert b"sleep 777" not in (await execute(boxes.runtime, clone.handle, "ps"))[1]
    else:
        with pytest.raises(AlveoleError, match="left in instance"):
            await boxes.capture(box)
    await goes_on(box)
    assert b"sleep 777" in (await execute(boxes.runtime, box.handle, "ps"))[1]


async def until_ended(boxes: Boxes, box: Box, word: str) -> None:
    """No process has the word in its command line."""

    async def reached() -> bool:
        return word.encode() not in (await execute(boxes.runtime, box.handle, "ps"))[1]

    await until(reached)


@pytest.mark.parametrize("tty", [False, True])
async def test_what_is_typed_reaches_each(boxes: Boxes, tty: bool) -> None:
    script = "while read line; do echo got $line; done; exit 6"
    process = {"tty": tty, "stdin": True}
    original = await boxes.create("sh", "-c", script, process=process)
    first = await boxes.runtime.attach(original.handle)
    await boxes.runtime.start(original.handle)
    await first.write(b"before\n")
    async for _, data in first.output():
        if b"got before" in data:
            break
    moment = await boxes.capture(original)
    clone = await boxes.create(
        "sh", "-c", script, process=process, files=moment.files, origin=moment.directory, hostname="clone"
    )
    second = await boxes.runtime.attach(clone.handle)
    await boxes.runtime.start(clone.handle)
    for number, stream in enumerate((first, second)):
        await stream.write(f"after {number}\n".encode())
        await stream.close_stdin()
        assert f"got after {number}".encode() in (await asyncio.wait_for(collect(stream), SECONDS))[0]
        assert await stream.wait() == 6
        await stream.close()


# --- the network ------------------------------------------------------------------------------------------------------


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


SERVE = "echo hello >/index.html; busybox httpd -p 80 -h /; echo serves; "


async def serves(box: Box, word: str = "serves") -> None:
    async def reached() -> bool:
        return word in await box.lines()

    await until(reached)


async def test_each_is_reached_at_its_own_address(boxes: Boxes) -> None:
    """Also a clone of a clone. Each knows no address but its own."""
    lab = Lab(boxes.here)
    network, address = lab.place()
    box = await boxes.start("sh", "-c", SERVE + "sleep 1000", network_namespace=network)
    await serves(box)
    for _ in range(2):
        moment = await boxes.capture(box)
        assert lab.get(address) == "hello\n"
        network, address = lab.place()
        box = await boxes.clone(moment, network_namespace=network, hostname="clone")
        assert lab.get(address) == "hello\n"
        _, shown, _ = await execute(boxes.runtime, box.handle, "busybox", "ip", "-4", "address", "show", "dev", "eth0")
        assert [word for word in shown.decode().split() if word.startswith("10.")] == [f"{address}/32"]


async def test_connections_end_and_new_ones_can_be_made(boxes: Boxes) -> None:
    """In the original too: this engine cannot keep them."""
    lab = Lab(boxes.here)
    network, address = lab.place()
    echo = "while :; do nc -l -p 81 -e cat; echo over; done"
    box = await boxes.start("sh", "-c", SERVE + echo, network_namespace=network)
    await serves(box)
    with lab.connect(address, 81) as client:
        assert client.stdin
        assert client.stdout
        client.stdin.write(b"words\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"words\n"
        moment = await boxes.capture(box)
        assert client.stdout.read() == b""
    network, other = lab.place()
    clone = await boxes.clone(moment, network_namespace=network)
    for each, where in ((box, address), (clone, other)):
        await serves(each, "over")
        with lab.connect(where, 81) as client:
            assert client.communicate(b"again\n")[0] == b"again\n"


async def test_one_that_waits_for_a_connection_can_be_captured(boxes: Boxes) -> None:
    lab = Lab(boxes.here)
    network, _ = lab.place()
    drop = ["ip", "route", "add", "blackhole", "10.78.0.0/16"]  # nothing answers from there
    subprocess.run(["nsenter", f"--net={lab.namespace}", *drop], check=True)
    script = SERVE + "(nc 10.78.0.1 9; echo gave up) & i=0; while :; do echo $i; sleep 0.02; done"
    box = await boxes.start("sh", "-c", script, network_namespace=network)
    await serves(box, "0")
    moment = await boxes.capture(box)
    await goes_on(box)
    network, address = lab.place()
    await goes_on(await boxes.clone(moment, network_namespace=network))
    assert lab.get(address) == "hello\n"


PYTHON = """
import socket, time
bound, connected = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
bound.bind(("{address}", 53))
connected.connect(("10.77.0.1", 53))
while True:
    print(1)
    time.sleep(0.02)
"""


async def test_sockets_bound_to_the_former_address_are_no_hindrance(boxes: Boxes) -> None:
    """Nor are those of the first in a clone of a clone."""
    lab = Lab(boxes.here)
    network, address = lab.place()
    files = boxes.here.directory / "before"
    files.mkdir()
    for name in ("lib", "lib64"):
        (files / name).symlink_to(f"usr/{name}")
    mounts = (CellMount(target="/usr", source=Path("/usr"), read_only=True),)
    script = PYTHON.format(address=address)
    command = ("/usr/bin/python3", "-u", "-c", script)
    box = await boxes.start(*command, network_namespace=network, mounts=mounts, files=files)
    await goes_on(box)
    for _ in range(2):
        moment = await boxes.capture(box)
        network, address = lab.place()
        box = await boxes.clone(moment, network_namespace=network, mounts=mounts)
        await goes_on(box)


# --- a daemon that dies -----------------------------------------------------------------------------------------------

DAEMON = """
import asyncio, pickle, sys
work = pickle.load(sys.stdin.buffer)
async def main():
    runtime = work["world"].reopen()
    if "directory" in work:
        async def still():
            print("still", flush=True)
            await asyncio.sleep(1000)
        print("begin", flush=True)
        await runtime.capture(work["handle"], work["directory"], still, go_on=False)
    else:
        print("begin", flush=True)
        await runtime.start(await runtime.create(work["cell"]))
        print("started", flush=True)
        await asyncio.sleep(1000)
asyncio.run(main())
"""


class Daemon:
    """Another process that captures or clones a sandbox, and is killed."""

    def __init__(self, **work: Any) -> None:
        path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
        self._process = subprocess.Popen(
            [sys.executable, "-c", DAEMON],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        assert self._process.stdin
        pickle.dump(work, self._process.stdin)
        self._process.stdin.close()

    def expect(self, word: str) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.strip() == word.encode():
                return
        pytest.fail(f"the daemon never said {word}")

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


async def test_one_that_a_dead_daemon_captured_goes_on(boxes: Boxes) -> None:
    box = await boxes.start()
    await goes_on(box)
    directory = boxes.here.directory / "moment"
    directory.mkdir()
    daemon = Daemon(world=boxes.here, handle=box.handle, directory=directory)
    daemon.expect("still")
    daemon.kill()
    stood = await box.counts()
    await asyncio.sleep(0.3)
    assert await box.counts() == stood
    runtime, cell = boxes.here.reopen(), box.cell
    assert (await runtime.recover(cell.id, cell.directory, cell.run_directory)).state is State.RUNNING
    await goes_on(box)
    await goes_on(await boxes.clone(await boxes.capture(box)))


@pytest.mark.parametrize("delay_ms", [0, 60, 150, 250, 400])
async def test_a_clone_that_a_dead_daemon_made_is_gone_on_with_or_removed(boxes: Boxes, delay_ms: int) -> None:
    """At any moment: the next daemon finds it created, and starts it, or running, or half made, and removes it."""
    box = await boxes.start()
    await goes_on(box)
    moment = await boxes.capture(box)
    cell, files = await boxes.cell(files=moment.files, origin=moment.directory, hostname="clone")
    daemon = Daemon(world=boxes.here, cell=cell)
    daemon.expect("begin")
    await asyncio.sleep(delay_ms / 1000)
    daemon.kill()
    runtime = boxes.here.reopen()
    found = await runtime.recover(cell.id, cell.directory, cell.run_directory)
    if found.handle is not None:
        if found.state is State.CREATED:
            await runtime.start(found.handle)
        clone = Box(cell=cell, handle=found.handle, files=files)
        await goes_on(clone)
        assert (await execute(runtime, clone.handle, "hostname"))[1] == b"clone\n"
    await delete(runtime, cell)
    assert not traces(boxes.here, cell)
    await goes_on(box)
