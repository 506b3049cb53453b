"""The daemon killed at any moment: instances live on, half-made ones can be removed without a trace."""

import asyncio
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from alveole.host import pidfd
from alveole.runtime import conmon
from alveole.runtime.base import Cell, State
from alveole.runtime.conmon import Place
from tests.runtime_world import World, collect, delete, run_to_end, world

pytestmark = pytest.mark.root
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20
FOREVER = ("sleep", "1000")
DAEMON = """
import asyncio, pickle, sys
world, cell = pickle.load(sys.stdin.buffer)
async def main():
    runtime = world.reopen()
    print("begin", flush=True)
    handle = await runtime.create(cell)
    print("created", flush=True)
    await runtime.start(handle)
    print("started", flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
        for name in ("crun", "runsc")
    ]
)
async def here(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with world(request.param) as made:
        yield made


class Daemon:
    """Another process that makes and starts a cell, and can be killed with its process group."""

    def __init__(self, here: World, cell: Cell) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", DAEMON],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            start_new_session=True,
        )
        assert self._process.stdin
        pickle.dump((here, cell), self._process.stdin)
        self._process.stdin.close()

    def expect(self, word: str) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.strip() == word.encode():
                return
        pytest.fail(f"the daemon never said {word}")

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


def traces(here: World, cell: Cell) -> list[str]:
    """What is left of a cell on this host."""
    assert here.cgroups
    return [
        *(f"process {pid}" for pid, _ in pidfd.with_arguments(str(cell.run_directory / "bundle"))),
        *(f"cgroup {mount / cell.cgroup}" for mount in here.cgroups.layout.mounts if (mount / cell.cgroup).exists()),
        *(str(path) for path in (*cell.directory.iterdir(), *cell.run_directory.iterdir())),
    ]


@pytest.mark.parametrize("delay_ms", [0, 3, 6, 10, 15, 25, 40, 80, 130])
async def test_killed_while_making_it_leaves_what_delete_removes(here: World, delay_ms: int) -> None:
    cell = here.cell(*FOREVER)
    daemon = Daemon(here, cell)
    daemon.expect("begin")
    await asyncio.sleep(delay_ms / 1000)
    daemon.kill()
    runtime = here.reopen()
    found = await runtime.recover(cell.id, cell.directory, cell.run_directory)
    assert found.state in {State.ABSENT, State.CREATED, State.RUNNING}
    await delete(runtime, cell)
    assert traces(here, cell) == []
    code, stdout, _ = await run_to_end(runtime, here.cell("echo", "works"))
    assert (code, stdout) == (0, b"works\n")


async def test_an_instance_outlives_its_daemon_and_its_process_group(here: World) -> None:
    cell = here.cell("sh", "-c", "while read line; do echo got $line; done; exit 9", process={"stdin": True})
    daemon = Daemon(here, cell)
    daemon.expect("started")
    daemon.kill()
    runtime = here.reopen()
    found = await runtime.recover(cell.id, cell.directory, cell.run_directory)
    assert found.state == State.RUNNING
    assert found.handle
    stream = await runtime.attach(found.handle)
    await stream.write(b"words\n")
    await stream.close_stdin()
    assert await asyncio.wait_for(collect(stream), SECONDS) == (b"got words\n", b"")
    await stream.close()
    assert (await asyncio.wait_for(runtime.wait(found.handle), SECONDS)).code == 9


async def test_it_ends_while_no_daemon_is_there(here: World) -> None:
    cell = here.cell("sh", "-c", "sleep 0.3; exit 9")
    daemon = Daemon(here, cell)
    daemon.expect("started")
    daemon.kill()
    await asyncio.sleep(0.8)
    runtime = here.reopen()
    found = await runtime.recover(cell.id, cell.directory, cell.run_directory)
    assert found.state == State.EXITED
    assert found.handle
    assert (await runtime.wait(found.handle)).code == 9


async def test_when_the_monitor_is_lost_the_instance_is_killed_and_that_is_said(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    handle = await runtime.create(cell)
    await runtime.start(handle)
    os.kill(handle.monitor_pid, signal.SIGKILL)
    ended = await asyncio.wait_for(runtime.wait(handle), SECONDS)
    assert (ended.code, ended.reason) == (None, "monitor lost")
    assert here.cgroups
    assert not here.cgroups.processes(cell.cgroup)
    assert (await runtime.recover(cell.id, cell.directory, cell.run_directory)).state == State.EXITED


async def test_a_restart_of_the_host_leaves_it_absent(here: World) -> None:
    runtime, created = here.reopen(), here.cell(*FOREVER)
    await runtime.create(created)
    saved = (created.directory / "handle.json").read_bytes()
    await delete(runtime, created)  # processes, cgroups and /run are gone after a restart
    (created.directory / "handle.json").write_bytes(saved)
    assert (await runtime.recover(created.id, created.directory, created.run_directory)).state == State.ABSENT
    await delete(runtime, created)
    assert traces(here, created) == []


async def test_a_create_that_is_cancelled_leaves_nothing(here: World) -> None:
    runtime = here.reopen()
    for delay_ms in (1, 5, 20):
        cell = here.cell(*FOREVER)
        creating = asyncio.ensure_future(runtime.create(cell))
        await asyncio.sleep(delay_ms / 1000)
        if not creating.cancel():  # a quick host has made it by then
            await delete(runtime, cell)
            continue
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert traces(here, cell) == []


async def test_a_monitor_that_was_never_recorded_is_found(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    handle = await runtime.create(cell)
    place = Place(cell.id, cell.directory, cell.run_directory)
    place.monitor_pid_file.unlink()
    place.handle_file.unlink()
    assert (handle.monitor_pid, handle.monitor_started) in conmon.makers(place)
    await delete(runtime, cell)
    assert traces(here, cell) == []
