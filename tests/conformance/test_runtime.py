"""The Runtime contract, sentence by sentence, held by the fake and by every real wall alike."""

import asyncio
import shutil
import signal
import time
from collections.abc import AsyncIterator

import pytest

from alveole.model.agent import ExecRequest
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Resources
from alveole.runtime.base import Cell, Handle, Runtime, State
from alveole.runtime.fake import Program
from tests.runtime_world import World, collect, delete, execute, process_of, run_to_end, world

EXIT_3 = ("sh", "-c", "echo out; echo err >&2; exit 3")
HANDLES_TERM = ("sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.02; done")
IGNORES_TERM = ("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.02; done")
FOREVER = ("sleep", "1000")
ENDS_SOON = ("sleep", "0.2")
EXEC_7 = ("sh", "-c", "echo inside; exit 7")
HOG = ("sh", "-c", "x=0123456789abcdef; while :; do x=$x$x; done")
NOT_THERE = ("no-such-command",)

PROGRAMS = {
    EXIT_3: Program(code=3, stdout=b"out\n", stderr=b"err\n"),
    HANDLES_TERM: Program(after_s=None, stdout=b"ready\n", handles={signal.SIGTERM: 5}),
    IGNORES_TERM: Program(after_s=None, stdout=b"ready\n", handles={signal.SIGTERM: None}),
    FOREVER: Program(after_s=None),
    ENDS_SOON: Program(after_s=0.2),
    EXEC_7: Program(code=7, stdout=b"inside\n"),
    HOG: Program(out_of_memory=True),
}
REAL = [
    pytest.param(
        name,
        marks=[pytest.mark.root, pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is missing")],
    )
    for name, program in {"crun": "crun", "runsc": "runsc", "qemu": "qemu-system-x86_64"}.items()
]
SECONDS = 20


@pytest.fixture(params=["fake", *REAL])
async def here(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with world(request.param, PROGRAMS) as made:
        yield made


async def started(runtime: Runtime, cell: Cell) -> Handle:
    """Created and started; if it prints "ready", that was seen."""
    handle = await runtime.create(cell)
    stream = await runtime.attach(handle)
    await runtime.start(handle)
    if b"ready" in " ".join(cell.process.args).encode():
        async with asyncio.timeout(SECONDS):
            async for _, data in stream.output():
                if b"ready" in data:
                    break
    await stream.close()
    return handle


async def state(runtime: Runtime, cell: Cell) -> State:
    return (await runtime.recover(cell.id, cell.directory, cell.run_directory)).state


async def test_probe_finds_nothing_lacking_on_a_host_that_can(here: World) -> None:
    assert await here.reopen().probe() == ""


async def test_created_runs_nothing_until_started(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*EXIT_3)
    handle = await runtime.create(cell)
    assert await state(runtime, cell) == State.CREATED
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(runtime.wait(handle), 0.1)
    await runtime.start(handle)
    assert (await runtime.wait(handle)).code == 3


async def test_wait_says_how_it_ended_again_and_again(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*EXIT_3)
    before = time.time()
    handle = await started(runtime, cell)
    first = await runtime.wait(handle)
    assert (first.code, first.reason) == (3, "exited")
    assert before - 1 <= first.finished_at <= time.time() + 1
    assert await runtime.wait(handle) == first
    assert await here.reopen().wait(handle) == first
    assert await state(runtime, cell) == State.EXITED


async def test_two_can_wait_and_one_give_up(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*ENDS_SOON)
    handle = await started(runtime, cell)
    impatient, patient = asyncio.ensure_future(runtime.wait(handle)), asyncio.ensure_future(runtime.wait(handle))
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).code == 0


async def test_starting_twice_starts_once(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    handle = await started(runtime, cell)
    await runtime.start(handle)
    assert await state(runtime, cell) == State.RUNNING


async def test_attached_before_the_start_nothing_is_lost_for_any_client(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*EXIT_3)
    handle = await runtime.create(cell)
    streams = [await runtime.attach(handle) for _ in range(3)]
    await runtime.start(handle)
    for stream in streams:
        assert await asyncio.wait_for(collect(stream), SECONDS) == (b"out\n", b"err\n")
        assert await stream.wait() == 3
        await stream.close()


async def test_an_instance_goes_on_when_its_client_leaves(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    handle = await started(runtime, cell)
    stream = await runtime.attach(handle)
    await stream.close()
    assert await state(runtime, cell) == State.RUNNING


async def test_attach_to_an_ended_instance_is_a_conflict(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*EXIT_3)
    handle = await started(runtime, cell)
    await runtime.wait(handle)
    with pytest.raises(AlveoleError) as caught:
        await runtime.attach(handle)
    assert caught.value.code == ErrorCode.CONFLICT


async def test_a_signal_reaches_the_first_process(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*HANDLES_TERM)
    handle = await started(runtime, cell)
    await runtime.signal(handle, signal.SIGTERM)
    ended = await asyncio.wait_for(runtime.wait(handle), SECONDS)
    assert (ended.code, ended.reason) == (5, "exited")


async def test_a_signal_to_an_ended_instance_does_nothing(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*EXIT_3)
    handle = await started(runtime, cell)
    ended = await runtime.wait(handle)
    await runtime.signal(handle, signal.SIGTERM)
    await runtime.kill(handle)
    assert await runtime.wait(handle) == ended


async def test_kill_ends_what_ignores_signals(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*IGNORES_TERM)
    handle = await started(runtime, cell)
    await runtime.signal(handle, signal.SIGTERM)
    await asyncio.sleep(0.1)
    assert await state(runtime, cell) == State.RUNNING
    await runtime.kill(handle)
    ended = await asyncio.wait_for(runtime.wait(handle), SECONDS)
    assert (ended.code, ended.reason) == (137, "killed by SIGKILL")


async def test_lack_of_memory_is_told(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*HOG, resources=Resources(memory_bytes=128 << 20))
    handle = await runtime.create(cell)
    await runtime.start(handle)
    ended = await asyncio.wait_for(runtime.wait(handle), SECONDS)
    assert ended.reason == "out of memory"
    assert ended.code


async def test_a_command_that_the_image_lacks_is_invalid_and_leaves_nothing(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*NOT_THERE)
    with pytest.raises(AlveoleError) as caught:
        await runtime.start(await runtime.create(cell))
    assert caught.value.code == ErrorCode.INVALID
    assert "no-such-command" in caught.value.message
    assert caught.value.field == "command"
    await delete(runtime, cell)
    assert await state(runtime, cell) == State.ABSENT


async def test_exec_gives_output_and_exit_code(here: World) -> None:
    runtime = here.reopen()
    handle = await started(runtime, here.cell(*FOREVER))
    assert await execute(runtime, handle, *EXEC_7) == (7, b"inside\n", b"")


async def test_exec_of_what_the_image_lacks_is_invalid(here: World) -> None:
    runtime = here.reopen()
    handle = await started(runtime, here.cell(*FOREVER))
    with pytest.raises(AlveoleError) as caught:
        await execute(runtime, handle, *NOT_THERE)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID, "command")


async def test_exec_in_an_instance_that_ended_is_a_conflict(here: World) -> None:
    runtime = here.reopen()
    handle = await started(runtime, here.cell(*EXIT_3))
    await runtime.wait(handle)
    with pytest.raises(AlveoleError) as caught:
        await runtime.exec(handle, ExecRequest(command=EXEC_7), process_of(*EXEC_7))
    assert caught.value.code == ErrorCode.CONFLICT


async def test_a_closed_exec_is_killed_and_the_instance_goes_on(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    handle = await started(runtime, cell)
    stream = await runtime.exec(handle, ExecRequest(command=IGNORES_TERM), process_of(*IGNORES_TERM))
    await stream.close()
    assert await asyncio.wait_for(stream.wait(), SECONDS) == 137
    assert await state(runtime, cell) == State.RUNNING


async def test_a_new_daemon_finds_created_running_and_ended_instances(here: World) -> None:
    old = here.reopen()
    created, running, ended = here.cell(*FOREVER), here.cell(*FOREVER), here.cell(*EXIT_3)
    await old.create(created)
    await started(old, running)
    await old.wait(await started(old, ended))

    new = here.reopen()
    found = {
        cell.id: await new.recover(cell.id, cell.directory, cell.run_directory) for cell in (created, running, ended)
    }
    assert [found[cell.id].state for cell in (created, running, ended)] == [
        State.CREATED,
        State.RUNNING,
        State.EXITED,
    ]
    adopted, finished = found[running.id].handle, found[ended.id].handle
    assert adopted
    assert finished
    assert (await new.wait(finished)).code == 3
    await new.kill(adopted)
    assert (await asyncio.wait_for(new.wait(adopted), SECONDS)).code == 137


async def test_what_was_never_made_is_absent_and_deleting_it_does_nothing(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    assert await state(runtime, cell) == State.ABSENT
    await delete(runtime, cell)
    await delete(runtime, cell)


@pytest.mark.parametrize("reached", [State.CREATED, State.RUNNING, State.EXITED])
async def test_delete_removes_all_from_every_state_but_the_log(here: World, reached: State) -> None:
    runtime, cell = here.reopen(), here.cell(*(EXIT_3 if reached == State.EXITED else FOREVER))
    handle = await runtime.create(cell)
    if reached != State.CREATED:
        await runtime.start(handle)
    if reached == State.EXITED:
        await runtime.wait(handle)
    assert await state(runtime, cell) == reached
    for _ in range(2):
        await delete(runtime, cell)
        assert await state(runtime, cell) == State.ABSENT
        assert [*cell.directory.iterdir(), *cell.run_directory.iterdir()] == []
        assert cell.log_path.exists() == (here.fake is None)


async def test_the_same_cell_can_be_made_again(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*EXIT_3)
    for _ in range(2):
        assert await run_to_end(runtime, cell) == (3, b"out\n", b"err\n")


async def test_creating_over_a_leftover_replaces_it(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    old = await started(runtime, cell)
    new = await runtime.create(cell)
    assert await state(runtime, cell) == State.CREATED
    assert new != old or here.fake


async def test_a_paused_instance_goes_on_when_resumed(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*HANDLES_TERM)
    handle = await started(runtime, cell)
    await runtime.pause(handle)
    await runtime.resume(handle)
    await runtime.signal(handle, signal.SIGTERM)
    assert (await asyncio.wait_for(runtime.wait(handle), SECONDS)).code == 5


async def test_a_paused_instance_can_be_killed(here: World) -> None:
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    handle = await started(runtime, cell)
    await runtime.pause(handle)
    await runtime.kill(handle)
    assert (await asyncio.wait_for(runtime.wait(handle), SECONDS)).code == 137
