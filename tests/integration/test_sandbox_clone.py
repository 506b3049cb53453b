"""Clones of sandboxes: commands, terminals and the network, in them and in what they were captured from."""

import asyncio
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from alveole.model.agent import ExecRequest
from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.base import CellMount
from tests.runtime_world import World, collect, execute, process_of, world
from tests.sandbox_world import SECONDS, SERVE, Box, Boxes, Lab, goes_on, serves, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("runsc") is None, reason="runsc is not installed"),
]


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world("runsc") as made:
        yield made


@pytest.fixture
def boxes(here: World) -> Boxes:
    return Boxes(here)


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


async def listens(boxes: Boxes, box: Box) -> None:
    async def reached() -> bool:
        return b":81 " in (await execute(boxes.runtime, box.handle, "busybox", "netstat", "-ltn"))[1]

    await until(reached)


async def test_connections_end_and_new_ones_can_be_made(boxes: Boxes) -> None:
    """In the original too: this engine cannot keep them."""
    lab = Lab(boxes.here)
    network, address = lab.place()
    echo = "while :; do nc -l -p 81 -e cat; echo over; done"
    box = await boxes.start("sh", "-c", SERVE + echo, network_namespace=network)
    await listens(boxes, box)
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
        await listens(boxes, each)
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


PYTHON = ("/usr/bin/python3", "-u", "-c")
SOCKETS = """
import socket, time
bound, connected = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
bound.bind(("{address}", 53))
connected.connect(("10.77.0.1", 53))
while True:
    print(1)
    time.sleep(0.02)
"""
FILES = """
import mmap, sqlite3, struct, time
with open("/mapped", "w+b") as file:
    file.truncate(16384)
    mapped = mmap.mmap(file.fileno(), 16384)
rows = sqlite3.connect("/rows", isolation_level=None)
rows.execute("pragma journal_mode=wal")
rows.execute("create table counts (count)")
count = 0
while True:
    count += 1
    struct.pack_into("=Q", mapped, 8192, count)
    rows.execute("insert into counts values (?)", (count,))
    print(count)
    time.sleep(0.01)
"""
CHECK = """
import sqlite3
rows = sqlite3.connect("/rows")
(well,), (whole,) = (rows.execute(query).fetchone() for query in (
    "pragma integrity_check", "select count(*) = max(count) from counts"))
print(well, whole)
"""
USR = (CellMount(target="/usr", source=Path("/usr"), read_only=True),)


def python_files(here: World) -> Path:
    """What makes the host's Python, bound to /usr, find its libraries."""
    files = here.directory / "python"
    files.mkdir()
    for name in ("lib", "lib64"):
        (files / name).symlink_to(f"usr/{name}")
    return files


async def test_files_are_what_memory_takes_them_for(boxes: Boxes) -> None:
    """Those that are mapped, and a database in the middle of its work."""
    original = await boxes.start(*PYTHON, FILES, mounts=USR, files=python_files(boxes.here))
    await goes_on(original)
    moment = await boxes.capture(original)
    clone = await boxes.clone(moment, mounts=USR, hostname="clone")
    await goes_on(clone)
    (mapped,) = struct.unpack_from("=Q", (moment.files / "mapped").read_bytes(), 8192)
    assert mapped in {(await clone.counts())[0] - 1, (await clone.counts())[0]}
    for box in (original, clone):
        await goes_on(box)
        assert await execute(boxes.runtime, box.handle, *PYTHON, CHECK) == (0, b"ok 1\n", b"")


async def test_sockets_bound_to_the_former_address_are_no_hindrance(boxes: Boxes) -> None:
    """Nor are those of the first in a clone of a clone."""
    lab = Lab(boxes.here)
    network, address = lab.place()
    script = SOCKETS.format(address=address)
    box = await boxes.start(*PYTHON, script, network_namespace=network, mounts=USR, files=python_files(boxes.here))
    await goes_on(box)
    for _ in range(2):
        moment = await boxes.capture(box)
        network, address = lab.place()
        box = await boxes.clone(moment, network_namespace=network, mounts=USR)
        await goes_on(box)
