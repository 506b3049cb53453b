"""Templates of machines: made once for each shape, found out when damaged, and nothing of one clone is another's."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from alveole.host.qmp import connected
from alveole.model.instance import Resources
from alveole.runtime.base import Cell, Handle
from alveole.runtime.qemu.capture import monitor_socket
from alveole.runtime.qemu.runtime import QemuRuntime
from alveole.runtime.qemu.template import MEMORY, STATE, TemplateRecord
from alveole.runtime.qemu.template_pool import UNUSED_S
from tests.integration.daemon import until
from tests.runtime_world import World, execute, world

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]
ROOT = Path(__file__).resolve().parents[2]
FOREVER = ("sleep", "1000")
SMALL = Resources(memory_bytes=128 << 20)
SECONDS = 60.0
DAEMON = """
import asyncio, pickle, sys
from tests.integration.test_machine_template import runtime_of
here, cell = pickle.load(sys.stdin.buffer)
async def main():
    print("begin", flush=True)
    await runtime_of(here).create(cell)
asyncio.run(main())
"""


def slow(value: str) -> Any:
    """The same as an ordinary one, but for where it happens."""
    return pytest.param(value, marks=pytest.mark.slow)


def runtime_of(here: World) -> QemuRuntime:
    """A new one, as after a restart of the daemon, with templates of this world only."""
    assert here.cgroups
    return QemuRuntime(here.directory, here.directory / "state", here.cgroups)


def records(runtime: QemuRuntime) -> list[TemplateRecord]:
    return [record for _, record in runtime.templates.files.all()]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def here() -> AsyncIterator[World]:
    async with world("qemu") as made:
        (made.directory / "state").mkdir()
        yield made


async def begun(here: World, runtime: QemuRuntime, *args: str, **changes: Any) -> tuple[Cell, Handle]:
    cell = here.cell(*(args or FOREVER), **{"resources": SMALL, **changes})
    handle = await runtime.create(cell)
    await runtime.start(handle)
    return cell, handle


async def ended(runtime: QemuRuntime, *cells: Cell) -> None:
    for cell in cells:
        await runtime.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)


def machines_of(here: World) -> list[str]:
    """The command line of every QEMU and monitor that runs because of this world."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            mine = here.cgroup in path.read_text()
            argv = path.with_name("cmdline").read_bytes().decode().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if mine or (str(here.directory) in argv and "conmon" in argv):
            found.append(argv)
    return found


def traces(here: World) -> list[str]:
    """What there is of the making of templates."""
    assert here.cgroups
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [
        *machines_of(here),
        *(str(path) for path in here.directory.glob("t/*")),
        *(str(path) for path in here.directory.glob("state/templates/*.*")),
        *(str(path) for mount in here.cgroups.layout.mounts for path in (mount / here.cgroup).glob("template-*")),
        *(line.split()[4] for line in lines if f"{here.directory}/t/" in line),
    ]


async def test_a_shape_has_one_template_however_many_ask_at_once(here: World) -> None:
    runtime = runtime_of(here)
    made = await asyncio.gather(*(begun(here, runtime) for _ in range(3)))
    (record,) = records(runtime)
    assert (record.memory_mib, record.cpus) == (128, 1)
    await ended(runtime, *(cell for cell, _ in made))
    two = Resources(memory_bytes=128 << 20, cpus=2)
    cell, _ = await begun(here, runtime, resources=two)
    assert {record.cpus for record in records(runtime)} == {1, 2}
    await ended(runtime, cell)
    assert not traces(here)


async def test_clones_differ_in_all_that_must_not_be_guessed(here: World) -> None:
    """Random numbers are read by each at once after its start, before anything else could have stirred them."""
    runtime = runtime_of(here)
    script = "head -c 32 /dev/urandom | busybox xxd -p -c 64 >/random; date +%s >/time; sleep 1000"
    asked = time.time()
    made = [
        await begun(here, runtime, "busybox", "sh", "-c", script.replace("date", "busybox date"), hostname=f"host{n}")
        for n in range(2)
    ]
    answers = []
    for _, handle in made:
        read = "while ! test -s /time; do sleep 0.05; done; cat /random /time; hostname"
        _, stdout, _ = await execute(runtime, handle, "sh", "-c", read)
        answers.append(stdout.decode().split())
    (random, when, name), (other_random, other_when, other_name) = answers
    assert len(random) == len(other_random) == 64
    assert random != other_random
    assert (name, other_name) == ("host0", "host1")
    template = records(runtime)[0]
    assert template.created_at < asked
    assert asked - 1 <= int(when) <= int(other_when) <= time.time() + 1
    await ended(runtime, *(cell for cell, _ in made))


async def test_the_guests_kernel_is_told_that_it_is_a_clone(here: World) -> None:
    """Then it seeds its random numbers anew. The generation is another in each machine."""
    runtime = runtime_of(here)
    made = [await begun(here, runtime) for _ in range(2)]
    generations = []
    for cell, _ in made:
        async with connected(monitor_socket(cell.run_directory / "m"), cell.id) as monitor:
            generations.append((await monitor.execute("query-vm-generation-id"))["guid"])
    assert len(set(generations)) == 2
    cell, handle = made[0]
    key, address = cell.run_directory / "key", "root@169.254.0.2"
    options = [
        "-F",
        "/dev/null",
        "-i",
        str(key),
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
    ]
    argv = ["nsenter", f"--net=/proc/{handle.pid}/ns/net", "ssh", *options, address, "dmesg"]
    said = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=True, timeout=SECONDS)
    assert "crng reseeded due to virtual machine fork" in said.stdout
    await ended(runtime, *(cell for cell, _ in made))


async def test_memory_that_clones_do_not_write_is_shared(here: World) -> None:
    runtime = runtime_of(here)
    made = [await begun(here, runtime) for _ in range(2)]
    for _, handle in made:
        rollup = Path(f"/proc/{handle.pid}/smaps").read_text()
        assert not [line for line in rollup.splitlines() if line.startswith("VmFlags:") and " mg" in line]  # mergeable
        sizes = {"Rss": 0, "Pss": 0}
        inside = False
        for line in rollup.splitlines():
            name, _, rest = line.partition(":")
            if "-" in name.split(" ")[0]:
                inside = line.endswith(f"/{MEMORY}")
            elif inside and name in sizes:
                sizes[name] += int(rest.split()[0])
        assert sizes["Rss"] > 4 << 10  # kB
        assert sizes["Pss"] < 0.8 * sizes["Rss"]
    (cell, handle), (other, _) = made
    await execute(runtime, handle, "sh", "-c", "echo mine >/dev/shm/file")
    assert (await execute(runtime, made[1][1], "ls", "/dev/shm"))[1] == b""
    await ended(runtime, cell, other)


async def test_one_is_removed_while_a_machine_begins(here: World) -> None:
    """As soon as that has taken what it needs: it goes on all the same, and keeps only the memory."""
    runtime = runtime_of(here)
    cell, _ = await begun(here, runtime)
    await ended(runtime, cell)
    (key,) = (record.key for record in records(runtime) if (record.memory_mib, record.cpus) == (128, 1))
    cell = here.cell(*FOREVER, resources=SMALL)
    creating = asyncio.ensure_future(runtime.create(cell))
    while not (cell.directory / STATE).exists():
        assert not creating.done()
        await asyncio.sleep(0)
    freed_bytes, held_bytes = await runtime.templates.remove(key)
    assert not creating.done()
    assert 0 < freed_bytes < held_bytes
    handle = await creating
    await runtime.start(handle)
    assert (await execute(runtime, handle, "echo", "works"))[1] == b"works\n"
    assert (cell.directory / MEMORY).stat().st_nlink == 1
    assert not (cell.directory / STATE).exists()
    await ended(runtime, cell)
    assert not traces(here)


@pytest.mark.parametrize("name", [MEMORY, slow(STATE), slow("about.json")])
async def test_a_damaged_template_is_made_anew(here: World, name: str) -> None:
    """Found out by the first machine that would go on from it after a restart."""
    runtime = runtime_of(here)
    cell, _ = await begun(here, runtime)
    await ended(runtime, cell)
    before = next(record for record in records(runtime) if record.cpus == 1)
    damage(here.directory / "state/templates" / before.key / name)
    runtime = runtime_of(here)
    cell, handle = await begun(here, runtime)
    assert (await execute(runtime, handle, "echo", "sound"))[1] == b"sound\n"
    after = next(record for record in records(runtime) if record.cpus == 1)
    assert after.key == before.key
    assert after.created_at > before.created_at
    await ended(runtime, cell)


def damage(path: Path) -> None:
    """One byte in the middle of what it holds is another."""
    with path.open("r+b") as file:
        end = os.lseek(file.fileno(), 0, os.SEEK_END)
        start = os.lseek(file.fileno(), end // 2, os.SEEK_DATA) if path.name == MEMORY else end // 2
        byte = os.pread(file.fileno(), 1, start)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 0x55]), start)


@pytest.mark.parametrize("moment", [slow("jail"), slow("running"), "captured"])
async def test_a_daemon_killed_while_it_makes_one_leaves_nothing(here: World, moment: str) -> None:
    """Nothing that a daemon does not end when it starts; and the template is made again."""
    shape: dict[str, Any] = {"resources": Resources(memory_bytes=(130 + len(moment)) << 20)}
    cell = here.cell(*FOREVER, **shape)
    daemon = Killable(here, cell)
    signs = {"jail": "t/*/m/control.in", "running": "t/*/m/qmp/socket", "captured": "state/templates/*.new/pages"}
    await asyncio.to_thread(until, lambda: list(here.directory.glob(signs[moment])), SECONDS, moment)
    daemon.kill()
    runtime = runtime_of(here)
    await runtime.open(here.cgroup)
    assert not traces(here)
    await ended(runtime, cell)
    cell, handle = await begun(here, runtime, **shape)
    assert (await execute(runtime, handle, "echo", "works"))[1] == b"works\n"
    await ended(runtime, cell)
    assert not traces(here)


class Killable:
    """Another process that makes a machine."""

    def __init__(self, here: World, cell: Cell) -> None:
        path = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        argv, pipe = [sys.executable, "-c", DAEMON], subprocess.PIPE
        self._process = subprocess.Popen(argv, stdin=pipe, env={**os.environ, **path}, start_new_session=True)
        assert self._process.stdin
        pickle.dump((here, cell), self._process.stdin)
        self._process.stdin.close()

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


async def test_templates_of_other_versions_are_forgotten_at_the_start(here: World) -> None:
    """Whoever goes on from one keeps its memory."""
    runtime = runtime_of(here)
    cell, handle = await begun(here, runtime)
    templates = here.directory / "state/templates"
    (record,) = (found for found in records(runtime) if (found.memory_mib, found.cpus) == (128, 1))
    about = templates / record.key / "about.json"
    about.write_bytes(TemplateRecord.from_json(about.read_bytes()).replace(qemu="0.1").to_json())
    kept = {found.key for found in records(runtime)} - {record.key}
    (templates / "half.new").mkdir()
    runtime = runtime_of(here)
    await runtime.open(here.cgroup)
    assert {path.name for path in templates.iterdir()} == kept
    assert (await execute(runtime, handle, "echo", "goes on"))[1] == b"goes on\n"
    await ended(runtime, cell)


@pytest.mark.slow
async def test_templates_that_nobody_used_for_long_are_forgotten_at_the_start(here: World) -> None:
    runtime = runtime_of(here)
    for mib in (128, 129):
        cell, _ = await begun(here, runtime, resources=Resources(memory_bytes=mib << 20))
        await ended(runtime, cell)
    templates = here.directory / "state/templates"
    unused = next(record.key for record in records(runtime) if record.memory_mib == 129)
    kept = {record.key for record in records(runtime)} - {unused}
    long_ago = time.time() - UNUSED_S - 60
    os.utime(templates / unused / "about.json", (long_ago, long_ago))
    await runtime_of(here).open(here.cgroup)
    assert {path.name for path in templates.iterdir()} == kept
