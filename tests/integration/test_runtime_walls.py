"""What the walls hold: isolation, limits and users as seen from inside real containers and sandboxes."""

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from alveole.model.agent import ExecRequest, LogLine
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Resources
from alveole.runtime.base import Capability, Cell, CellMount
from alveole.runtime.logfile import read_log
from tests.runtime_world import IDS, World, collect, execute, process_of, run_to_end, world

pytestmark = pytest.mark.root
SECONDS = 20
WALLS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
    for name in ("crun", "runsc")
]
FOREVER = ("sleep", "1000")


@pytest.fixture(params=WALLS)
async def here(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with world(request.param) as made:
        yield made


@pytest.fixture
async def crun() -> AsyncIterator[World]:
    async with world("crun") as made:
        yield made


async def said(here: World, script: str, **changes: Any) -> str:
    """What a shell script prints in a cell of its own, errors too."""
    runtime, cell = here.reopen(), here.cell("sh", "-c", f"exec 2>&1; {script}", **changes)
    _, stdout, _ = await asyncio.wait_for(run_to_end(runtime, cell), SECONDS)
    return stdout.decode()


async def test_port_80_can_be_bound(here: World) -> None:
    assert "bound" in await said(here, "nc -l -p 80 & sleep 0.3; kill %1 && echo bound")


async def test_sys_and_kernel_settings_are_read_only(here: World) -> None:
    script = "touch /sys/kernel/x || echo refused; echo 1 > /proc/sys/kernel/sysrq || echo refused"
    assert (await said(here, script)).count("refused") == 2


async def test_with_the_hosts_network_sys_is_read_only_all_the_way_down(crun: World) -> None:
    """A user namespace cannot mount /sys of a network it does not own: the host's is bound, submounts and all."""
    answer = await said(crun, "mkdir /sys/kernel/x || echo refused; cat /proc/mounts", network_namespace=None)
    assert "refused" in answer
    mounts = [line.split() for line in answer.splitlines() if " /sys" in line]
    assert any(target == "/sys" and kind == "sysfs" for _, target, kind, *_ in mounts)
    # v1 cgroups are shown below a tmpfs of the container's own, which may be writable
    writable = [target for _, target, kind, options, *_ in mounts if kind != "tmpfs" and "rw" in options.split(",")]
    assert not writable


async def test_root_inside_is_nobody_outside(crun: World) -> None:
    runtime, cell = crun.reopen(), crun.cell(*FOREVER)
    handle = await runtime.create(cell)
    assert f"Uid:\t{IDS.base}" in Path(f"/proc/{handle.pid}/status").read_text()
    await runtime.start(handle)
    assert (await execute(runtime, handle, "id", "-u"))[1] == b"0\n"


async def test_the_memory_limit_is_in_force_and_seen(here: World) -> None:
    limit = 128 << 20
    runtime, cell = here.reopen(), here.cell(*FOREVER, resources=Resources(memory_bytes=limit))
    handle = await runtime.create(cell)
    assert here.cgroups
    assert here.cgroups.usage(cell.cgroup).memory_limit_bytes == limit
    assert handle.pid in here.cgroups.processes(cell.cgroup)


async def test_the_number_of_processes_is_limited(crun: World) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; echo all started"
    assert "all started" not in await said(crun, script, resources=Resources(pids=5))
    assert "all started" in await said(crun, script, resources=Resources(pids=50))


async def test_a_command_run_later_is_limited_like_the_instance(crun: World) -> None:
    """It lands in the instance's cgroup, under its filter and without privileges to gain."""
    runtime = crun.reopen()
    handle = await runtime.create(crun.cell(*FOREVER, resources=Resources(pids=4)))
    await runtime.start(handle)
    forks = "for i in 1 2 3 4 5 6; do sleep 5 & done; echo all started"
    _, stdout, _ = await execute(runtime, handle, "sh", "-c", forks)
    assert b"all started" not in stdout
    _, status, _ = await execute(runtime, handle, "cat", "/proc/self/status")
    assert b"Seccomp:\t2" in status
    assert b"NoNewPrivs:\t1" in status


async def test_the_second_container_is_filtered_like_the_first(crun: World) -> None:
    """The first compiles the seccomp rules, later ones are handed the compiled form: both refuse the same."""
    runtime = crun.reopen()
    script = "grep Seccomp: /proc/self/status; unshare -m true && echo escaped"
    answers = [await run_to_end(runtime, crun.cell("sh", "-c", script)) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0][1] == b"Seccomp:\t2\n"


async def test_a_read_only_root_refuses_and_tmpfs_takes_until_full(here: World) -> None:
    script = (
        "touch /here || echo refused; dd if=/dev/zero of=/tmp/big bs=1M count=3 || echo full; touch /tmp/x && echo took"
    )
    mounts = (CellMount(target="/tmp", source=None, size_bytes=2 << 20),)
    answer = await said(here, f"touch /tmp/first; {script}; rm /tmp/big", read_only=True, mounts=mounts)
    assert "refused" in answer
    assert "full" in answer


async def test_mounts_are_seen_and_read_only_ones_refuse(here: World) -> None:
    shared = here.directory / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "greeting").write_text("hello\n")
    mounts = (
        CellMount(target="/rw", source=shared),
        CellMount(target="/ro", source=shared, read_only=True),
        CellMount(target="/etc/hostname", source=shared / "greeting", read_only=True),
    )
    answer = await said(here, "cat /ro/greeting /etc/hostname; touch /ro/x || echo refused; touch /rw/y", mounts=mounts)
    assert answer.startswith("hello\nhello\n")
    assert "refused" in answer
    assert (shared / "y").exists()


async def test_the_process_is_who_it_should_be(here: World) -> None:
    process = {"uid": 1000, "gid": 1001, "groups": (1002,), "workdir": "/tmp", "capabilities": ()}
    answer = await said(here, "id; pwd; hostname; echo $WORD; grep CapEff /proc/self/status", process={
        **process, "env": {"PATH": "/bin", "WORD": "a b=c"},
    })  # fmt: skip
    assert "uid=1000 gid=1001 groups=1001,1002" in answer or "uid=1000 gid=1001 groups=1002" in answer
    assert "/tmp\ncell\na b=c\n" in answer
    assert "CapEff:\t0000000000000000" in answer


async def test_no_more_open_files_than_the_host_allows(here: World) -> None:
    assert int((await said(here, "ulimit -n")).strip()) > 1000


async def test_a_command_on_a_terminal(here: World) -> None:
    """It sees a terminal of the given size, takes typing, and is resized."""
    runtime = here.reopen()
    handle = await runtime.create(here.cell(*FOREVER))
    await runtime.start(handle)
    script = "test -t 0 && stty size; read line; echo got $line; stty size; exit 4"
    request = ExecRequest(command=("sh", "-c", script), tty=True, stdin=True, rows=33, columns=101)
    stream = await runtime.exec(handle, request, process_of("sh", "-c", script, tty=True, stdin=True))
    seen = b""
    async with asyncio.timeout(SECONDS):
        async for _, data in stream.output():
            seen += data
            if b"33 101" in seen and b"got" not in seen:
                await stream.resize(50, 132)
                await stream.write(b"words\n")
                seen = b"typed got"
        assert b"got words" in seen
        assert b"50 132" in seen
        assert await stream.wait() == 4
    await stream.close()


async def test_an_instance_on_a_terminal_survives_its_client(here: World) -> None:
    runtime = here.reopen()
    script = "stty size; while read line; do echo got $line; done; exit 6"
    handle = await runtime.create(here.cell("sh", "-c", script, process={"tty": True, "stdin": True}))
    first = await runtime.attach(handle)
    await first.resize(20, 90)
    await runtime.start(handle)
    await first.write(b"one\n")
    async with asyncio.timeout(SECONDS):
        async for _, data in first.output():
            if b"got one" in data:
                break
    await first.close()
    second = await runtime.attach(handle)
    await second.write(b"two\n")
    await second.close_stdin()
    stdout, _ = await asyncio.wait_for(collect(second), SECONDS)
    assert b"got two" in stdout
    assert await second.wait() == 6
    await second.close()


async def test_input_reaches_a_command_and_ends(here: World) -> None:
    runtime = here.reopen()
    handle = await runtime.create(here.cell(*FOREVER))
    await runtime.start(handle)
    stream = await runtime.exec(handle, ExecRequest(command=("cat",), stdin=True), process_of("cat", stdin=True))
    data = bytes(range(256)) * 2000
    async with asyncio.timeout(SECONDS):
        writing = asyncio.ensure_future(_feed(stream.write, stream.close_stdin, data))
        assert await collect(stream) == (data, b"")
        await writing
        assert await stream.wait() == 0
    await stream.close()


async def _feed(write, close, data: bytes) -> None:  # type: ignore[no-untyped-def]
    await write(data)
    await close()


async def test_input_reaches_the_instance_and_ends(here: World) -> None:
    runtime = here.reopen()
    handle = await runtime.create(here.cell("cat", process={"stdin": True}))
    stream = await runtime.attach(handle)
    await runtime.start(handle)
    data = b"line of text\n" * 20_000
    async with asyncio.timeout(SECONDS):
        writing = asyncio.ensure_future(_feed(stream.write, stream.close_stdin, data))
        assert await collect(stream) == (data, b"")
        await writing
    await stream.close()


async def test_a_closed_command_is_gone_from_the_instance(here: World) -> None:
    runtime = here.reopen()
    handle = await runtime.create(here.cell(*FOREVER))
    await runtime.start(handle)
    stream = await runtime.exec(handle, ExecRequest(command=("sleep", "777")), process_of("sleep", "777"))
    assert b"sleep 777" in (await execute(runtime, handle, "ps"))[1]
    await stream.close()
    assert b"sleep 777" not in (await execute(runtime, handle, "ps"))[1]


async def test_a_missing_working_directory_is_named(here: World) -> None:
    runtime = here.reopen()
    handle = await runtime.create(here.cell(*FOREVER))
    await runtime.start(handle)
    with pytest.raises(AlveoleError) as caught:
        await execute(runtime, handle, "true", workdir="/nowhere")
    assert caught.value.code == ErrorCode.INVALID
    assert "/nowhere" in caught.value.message


async def test_logs_keep_streams_apart_through_rotations(here: World) -> None:
    """Nothing of what an instance prints is lost or doubled while its log is rotated under a follower."""
    runtime = here.reopen()
    script = "for i in $(seq 1 100); do echo line $i; echo error $i >&2; sleep 0.01; done; printf end"
    cell = here.cell("busybox", "sh", "-c", script.replace("seq", "busybox seq"))
    handle = await runtime.create(cell)
    ended = asyncio.Event()
    following = asyncio.ensure_future(_follow(cell, ended))
    await runtime.start(handle)
    for number in (2, 1):
        await asyncio.sleep(0.03)
        cell.log_path.rename(f"{cell.log_path}.{number}")
        await runtime.rotate_logs(handle, cell.log_path)
    await runtime.wait(handle)
    ended.set()
    followed = await asyncio.wait_for(following, SECONDS)
    expected = [f"line {i}" for i in range(1, 101)]
    assert [line.line for line in followed if line.stream == "stdout"] == [*expected, "end"]
    assert [line.line for line in followed if line.stream == "stderr"] == [f"error {i}" for i in range(1, 101)]
    assert followed[-1].partial or followed[-2].partial
    again = [line async for line in read_log(cell.log_path, follow=False, tail=None, since=None, finished=ended.is_set)]
    assert sorted(line.line for line in again) == sorted(line.line for line in followed)


async def _follow(cell: Cell, ended: asyncio.Event) -> list[LogLine]:
    lines = read_log(cell.log_path, follow=True, tail=None, since=None, finished=ended.is_set)
    return [line async for line in lines]


async def test_only_a_wall_with_the_capability_is_given_what_it_needs(here: World) -> None:
    """The bundle of a wall that takes no user namespace has none."""
    runtime, cell = here.reopen(), here.cell(*FOREVER)
    await runtime.create(cell)
    config = json.loads((cell.run_directory / "bundle/config.json").read_text())
    kinds = {namespace["type"] for namespace in config["linux"]["namespaces"]}
    assert ("user" in kinds) == (Capability.USER_NAMESPACE in runtime.capabilities)


async def test_an_orphan_of_a_killed_instance_is_killed_too(here: World) -> None:
    """Processes that left the first process's session end with the instance."""
    runtime, cell = (
        here.reopen(),
        here.cell("sh", "-c", "busybox setsid sleep 555 & busybox setsid sleep 556 & sleep 1000"),
    )
    handle = await runtime.create(cell)
    await runtime.start(handle)
    await asyncio.sleep(0.2)
    await runtime.kill(handle)
    assert (await runtime.wait(handle)).code == 128 + signal.SIGKILL
    assert here.cgroups
    assert not here.cgroups.processes(cell.cgroup)
