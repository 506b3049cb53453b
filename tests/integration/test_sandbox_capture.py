"""Sandboxes captured while they run: they go on, and so do others from there, each on its own from then on."""

import asyncio
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alveole.host import pidfd
from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.base import CellMount, State
from tests.runtime_world import World, delete, execute, world
from tests.sandbox_world import SECONDS, Box, Boxes, copy, goes_on, nothing, traces

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("runsc") is None, reason="runsc is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world("runsc") as made:
        yield made


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


async def test_a_signal_meanwhile_arrives_when_it_goes_on(boxes: Boxes) -> None:
    """In the original: it was sent to that."""
    original = await boxes.start()
    await goes_on(original)
    sending = []

    async def send() -> None:
        sending.append(asyncio.ensure_future(boxes.runtime.signal(original.handle, signal.SIGTERM)))
        await asyncio.sleep(0.2)

    moment = await boxes.capture(original, also=send)
    await asyncio.gather(*sending)
    assert (await asyncio.wait_for(boxes.runtime.wait(original.handle), SECONDS)).code == 5
    await goes_on(await boxes.clone(moment))


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
