"""What a machine may take: of memory, processors, disk, and of the host's files that its guest writes to."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Resources
from alveole.runtime.base import Cell, Handle
from alveole.runtime.qemu.argv import COMMANDS, CONSOLE, STATUS
from alveole.runtime.qemu.jail import OVERHEAD_BYTES
from alveole.runtime.qemu.runtime import LEAST_MEMORY_BYTES
from tests.integration.daemon import until
from tests.runtime_world import CARD, World, collect, execute, world

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]
MEMORY_BYTES, PIDS = 192 << 20, 20
FORKS = f"for i in $(busybox seq {PIDS}); do sleep 5 & done; echo all started"
FOREVER = ("sleep", "1000")
SECONDS = 60.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def here() -> AsyncIterator[World]:
    async with world("qemu") as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def machine(here: World) -> tuple[Cell, Handle]:
    """One of limits that no default has; no test ends it."""
    runtime = here.reopen()
    resources = Resources(memory_bytes=MEMORY_BYTES, cpus=1.5)
    cell = here.cell(*FOREVER, resources=resources)
    handle = await runtime.create(cell)
    await runtime.start(handle)
    return cell, handle


async def said(here: World, handle: Handle, script: str) -> str:
    _, stdout, stderr = await execute(here.reopen(), handle, "sh", "-c", script)
    return (stdout + stderr).decode()


async def as_guest_root(cell: Cell, handle: Handle, script: str) -> str:
    """Outside the instance, where only one could be that has broken out of it."""
    options = ["-F", "/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    login = ["ssh", *options, "-i", str(cell.run_directory / "key"), f"root@{CARD.control_address}"]
    argv = ["nsenter", f"--net=/proc/{handle.pid}/ns/net", *login, f"exec 2>&1; {script}"]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=SECONDS, check=False)
    return done.stdout


async def test_memory_is_the_guests_and_the_overhead_is_not(here: World, machine: tuple[Cell, Handle]) -> None:
    cell, handle = machine
    words = (await said(here, handle, "busybox free -k | grep Mem")).split()
    assert MEMORY_BYTES * 0.7 < int(words[1]) << 10 < MEMORY_BYTES
    assert here.cgroups
    assert here.cgroups.usage(cell.cgroup).memory_limit_bytes == MEMORY_BYTES + OVERHEAD_BYTES


async def test_processors_are_rounded_up_and_their_time_is_not(here: World, machine: tuple[Cell, Handle]) -> None:
    cell, handle = machine
    assert (await said(here, handle, "busybox nproc")).strip() == "2"
    assert here.cgroups
    layout = here.cgroups.layout
    if mount := layout.v1.get("cpu"):
        quota, period = ((mount / cell.cgroup / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    else:
        assert layout.v2
        quota, period = (layout.v2 / cell.cgroup / "cpu.max").read_text().split()
    assert int(quota) / int(period) == pytest.approx(1.5)


async def test_the_disk_is_as_large_as_was_said(here: World, machine: tuple[Cell, Handle]) -> None:
    disk = machine[0].root_disk
    assert disk
    answer = await said(here, machine[1], "dd if=/dev/zero of=/fill bs=1M; busybox rm /fill; echo goes on")
    assert "No space left" in answer
    assert "goes on" in answer
    assert disk.stat().st_size == 256 << 20
    assert disk.stat().st_blocks * 512 <= 256 << 20


async def test_too_little_memory_is_refused_by_name(here: World) -> None:
    cell = here.cell(*FOREVER, resources=Resources(memory_bytes=LEAST_MEMORY_BYTES - 1))
    with pytest.raises(AlveoleError, match="at least 128 MiB") as caught:
        await here.reopen().create(cell)
    assert caught.value.code == ErrorCode.INVALID


async def test_what_the_kernel_says_of_the_instance_fills_no_file(machine: tuple[Cell, Handle]) -> None:
    """Of a panic it must speak, and does so at the highest level."""
    cell, handle = machine
    console = cell.run_directory / "m" / CONSOLE
    await as_guest_root(cell, handle, "echo '<0>first emergency' >/dev/kmsg")
    before = console.stat().st_size
    assert b"first emergency" in console.read_bytes()
    await as_guest_root(cell, handle, "for i in $(seq 200); do echo '<1>out of memory' >/dev/kmsg; done")
    assert console.stat().st_size == before


async def test_names_of_commands_do_not_fill_their_file(here: World, machine: tuple[Cell, Handle]) -> None:
    cell, handle = machine
    await as_guest_root(cell, handle, "yes | head -c 300000 >/run/tell-command")
    assert (await said(here, handle, "echo works")) == "works\n"
    assert (await said(here, handle, "echo again")) == "again\n"
    assert (cell.run_directory / "m" / COMMANDS).stat().st_blocks * 512 <= 64 << 10


async def test_processes_are_limited_in_the_guest(here: World) -> None:
    """All of it: what is run in it later counts as well, and what ended counts no more."""
    runtime, cell = here.reopen(), here.cell("sh", "-c", FORKS, resources=Resources(pids=PIDS))
    handle = await runtime.create(cell)
    stream = await runtime.attach(handle)
    await runtime.start(handle)
    stdout, stderr = await collect(stream)
    await stream.close()
    assert b"can't fork" in stderr
    assert b"all started" not in stdout


async def test_a_guest_that_writes_without_end_fills_its_own_files_only(here: World) -> None:
    """It may lose what it has to tell, but the host loses nothing, and still ends it."""
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    handle = await runtime.create(cell)
    await runtime.start(handle)
    place = cell.run_directory / "m"
    size = os.statvfs(place).f_blocks * os.statvfs(place).f_frsize
    assert size <= 8 << 20
    await as_guest_root(cell, handle, "yes 'exited 7 exited' >/run/tell 2>&1 </dev/null &")
    await asyncio.to_thread(until, lambda: os.statvfs(place).f_bfree == 0, SECONDS, "a full status file")
    assert (place / STATUS).stat().st_size <= size
    await runtime.kill(handle)
    assert (await runtime.wait(handle)).code is not None
    await runtime.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)
    assert not list(cell.run_directory.iterdir())
