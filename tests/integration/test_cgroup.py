"""Cgroups on this host's layout, whatever it is: limits that crun writes, and measuring, freezing, killing."""

import asyncio
import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from alveole.host.cgroup import Cgroups, Layout
from alveole.host.cgroup_usage import memory_of
from alveole.host.mountinfo import mounts
from alveole.model.error import AlveoleError, ErrorCode

pytestmark = pytest.mark.root

MIB = 1 << 20
JOIN_AND = """
import os, sys, time
for procs in sys.argv[1:]:
    open(procs, "w").write(str(os.getpid()))
"""
SPIN = JOIN_AND + "while True: pass"
FORK_FOR_EVER = (
    JOIN_AND
    + """
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.001)
"""
)


@pytest.fixture
async def cgroup() -> AsyncIterator[tuple[Cgroups, str]]:
    """An instance's cgroup below a parent of this test's own; both are gone afterwards."""
    cgroups, parent = Cgroups(), f"alveole-{secrets.token_hex(4)}"
    cgroups.prepare(parent)
    cgroups.prepare(parent)
    name = f"{parent}/c1"
    yield cgroups, name
    await cgroups.kill(name)
    await cgroups.remove(name)
    await cgroups.remove(name)
    cgroups.release(parent)
    cgroups.release(parent)
    assert not [mount for mount in cgroups.layout.mounts if (mount / parent).exists()]


def run_in(cgroups: Cgroups, name: str, program: str) -> subprocess.Popen[bytes]:
    directories = [mount / name for mount in cgroups.layout.mounts]
    for directory in directories:
        directory.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (directory.parent / file).exists() and not (directory.parent / file).read_text().strip():
                (directory.parent / file).write_text((directory.parent.parent / file).read_text())
            if (directory / file).exists():
                (directory / file).write_text((directory.parent / file).read_text())
    files = [str(directory / "cgroup.procs") for directory in directories]
    return subprocess.Popen([sys.executable, "-c", program, *files], start_new_session=True)


async def joined(cgroups: Cgroups, name: str, number: int) -> None:
    async with asyncio.timeout(20):
        while len(cgroups.processes(name)) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def limit_pids(cgroups: Cgroups, name: str, number: int) -> None:
    mount = cgroups.layout.v1.get("pids") or cgroups.layout.v2
    assert mount
    (mount / name).mkdir(exist_ok=True)
    (mount / name / "pids.max").write_text(str(number))


class Container:
    """A crun container of busybox in the cgroup."""

    def __init__(self, directory: Path, cgroup: str) -> None:
        self._directory, self._cgroup, self._id = directory, cgroup, f"t{secrets.token_hex(4)}"
        programs = directory / "rootfs/bin"
        programs.mkdir(parents=True)
        shutil.copy("/bin/busybox", programs / "busybox")
        for name in ("sh", "dd", "sleep"):
            (programs / name).symlink_to("busybox")
        for name in ("proc", "dev", "sys", "tmp"):
            (directory / "rootfs" / name).mkdir()

    def start(self, script: str, resources: Mapping[str, Any]) -> None:
        self._crun("spec")
        path = self._directory / "config.json"
        config = json.loads(path.read_text())
        config["process"] |= {"terminal": False, "args": ["/bin/sh", "-c", script]}
        config["linux"] |= {"cgroupsPath": f"/{self._cgroup}", "resources": resources}
        path.write_text(json.dumps(config))
        self._crun("run", "--detach", self._id)

    def delete(self) -> None:
        self._crun("delete", "--force", self._id)

    def _crun(self, *arguments: str) -> None:
        argv = ["crun", "--cgroup-manager=cgroupfs", *arguments]
        nothing = subprocess.DEVNULL
        subprocess.run(argv, cwd=self._directory, check=True, stdin=nothing, stdout=nothing, stderr=nothing, timeout=60)


@pytest.fixture
def container(tmp_path: Path, cgroup: tuple[Cgroups, str]) -> Container:
    for program in ("crun", "busybox"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    return Container(tmp_path, cgroup[1])


async def test_a_memory_limit_holds_and_the_kill_is_counted(cgroup: tuple[Cgroups, str], container: Container) -> None:
    cgroups, name = cgroup
    script = "dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 60"
    container.start(script, {"memory": {"limit": 64 * MIB, "swap": 64 * MIB}})
    try:
        async with asyncio.timeout(20):
            while cgroups.oom_kills(name) == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert cgroups.oom_kills(name) == 1
        assert cgroups.usage(name).memory_limit_bytes == 64 * MIB
        await cgroups.kill(name)
    finally:
        container.delete()
    assert cgroups.oom_kills(name) == 0


async def test_a_cpu_quota_holds(cgroup: tuple[Cgroups, str], container: Container) -> None:
    cgroups, name = cgroup
    container.start("while :; do :; done", {"cpu": {"quota": 20_000, "period": 100_000}})
    try:
        before = cgroups.usage(name).cpu_s
        await asyncio.sleep(1.5)
        after = cgroups.usage(name).cpu_s
        assert before is not None
        assert after is not None
        assert 0 < after - before < 0.2 * 1.5 * 2  # the machine may be slow, but never faster than its quota
        await cgroups.kill(name)
    finally:
        container.delete()


async def test_a_limit_of_processes_holds(cgroup: tuple[Cgroups, str], container: Container) -> None:
    cgroups, name = cgroup
    script = "i=0; while [ $i -lt 40 ]; do sleep 60 & i=$((i+1)); done; sleep 60"
    container.start(script, {"pids": {"limit": 10}})
    try:
        async with asyncio.timeout(20):
            while not _refused_forks(cgroups, name):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert len(cgroups.processes(name)) <= 10
        await cgroups.kill(name)
    finally:
        container.delete()


def _refused_forks(cgroups: Cgroups, name: str) -> int:
    mount = cgroups.layout.v1.get("pids") or cgroups.layout.v2
    assert mount
    return int((mount / name / "pids.events").read_text().split()[1])


async def test_usage_is_that_of_the_processes(cgroup: tuple[Cgroups, str]) -> None:
    cgroups, name = cgroup
    with run_in(cgroups, name, JOIN_AND + "data = bytearray(50 << 20); time.sleep(60)") as process:
        async with asyncio.timeout(20):
            while (cgroups.usage(name).memory_bytes or 0) < 50 * MIB:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        usage = cgroups.usage(name)
        assert cgroups.processes(name) == {process.pid}
        assert usage.pids == 1
        assert usage.memory_limit_bytes is None
        memory = memory_of([process.pid])
        assert 50 * MIB < memory.own_bytes < 100 * MIB
        assert memory.own_bytes <= memory.pss_bytes < 100 * MIB
        await cgroups.kill(name)
    assert memory_of([process.pid]).pss_bytes == 0


async def test_frozen_processes_take_no_time_until_thawed_and_can_be_killed(cgroup: tuple[Cgroups, str]) -> None:
    cgroups, name = cgroup
    with run_in(cgroups, name, SPIN) as process:
        await joined(cgroups, name, 1)
        await asyncio.sleep(0.1)
        await cgroups.freeze(name)
        frozen_at = cgroups.usage(name).cpu_s
        await asyncio.sleep(0.3)
        assert cgroups.usage(name).cpu_s == frozen_at
        cgroups.thaw(name)
        await asyncio.sleep(0.3)
        assert (cgroups.usage(name).cpu_s or 0) > (frozen_at or 0)
        await cgroups.freeze(name)
        await cgroups.kill(name)
        assert process.wait() == -9
    assert cgroups.processes(name) == frozenset()


@pytest.mark.parametrize("only_v1", [False, True])
async def test_kill_ends_processes_that_fork_for_ever(cgroup: tuple[Cgroups, str], only_v1: bool) -> None:
    cgroups, name = cgroup
    if only_v1 and not cgroups.layout.v1:
        pytest.skip("this host has no v1 hierarchies")
    limit_pids(cgroups, name, 40)
    killer = Cgroups(Layout(v1=cgroups.layout.v1)) if only_v1 else cgroups
    with run_in(cgroups, name, FORK_FOR_EVER):
        await joined(cgroups, name, 20)
        await killer.kill(name)
    assert cgroups.processes(name) == frozenset()


async def test_remove_refuses_while_a_process_lives(cgroup: tuple[Cgroups, str]) -> None:
    cgroups, name = cgroup
    with run_in(cgroups, name, SPIN):
        await joined(cgroups, name, 1)
        with pytest.raises(AlveoleError) as caught:
            await cgroups.remove(name)
        assert caught.value.code is ErrorCode.CONFLICT
        await cgroups.kill(name)


async def test_what_does_not_exist_is_empty_killed_and_frozen_already(cgroup: tuple[Cgroups, str]) -> None:
    cgroups, name = cgroup
    missing = f"{name}-missing"
    await cgroups.kill(missing)
    await cgroups.freeze(missing)
    cgroups.thaw(missing)
    assert cgroups.usage(missing).pids is None
    assert cgroups.processes(missing) == frozenset()


def test_prepare_leaves_a_hybrid_v2_tree_without_controllers() -> None:
    """With any, crun refuses to run."""
    cgroups, parent = Cgroups(), f"alveole-{secrets.token_hex(4)}"
    if cgroups.layout.name != "hybrid":
        pytest.skip(f"this host's cgroups are {cgroups.layout.name}")
    cgroups.prepare(parent)
    try:
        assert cgroups.layout.v2
        assert (cgroups.layout.v2 / "cgroup.controllers").read_text().split() == []
        assert all((mount / parent).is_dir() for mount in cgroups.layout.mounts)
    finally:
        cgroups.release(parent)


async def test_a_controller_on_its_way_between_v1_and_v2_is_found(cgroup: tuple[Cgroups, str]) -> None:
    """A hierarchy whose mount another daemon has just removed is not in v2 yet: crun fails unless it is mounted."""
    cgroups, parent = cgroup[0], cgroup[1].partition("/")[0]
    ours = [entry for entry in mounts() if entry.filesystem == "cgroup" and entry.source == "alveole"]
    if not ours:
        pytest.skip("this host has no controller that Alveole takes out of v2")
    subprocess.run(["umount", ours[0].target], check=True)
    cgroups.prepare(parent)
    assert ours[0].target in {entry.target for entry in mounts() if entry.filesystem == "cgroup"}
    assert (Path(ours[0].target) / parent).is_dir()
