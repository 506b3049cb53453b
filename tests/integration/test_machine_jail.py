"""The jail of a machine, as QEMU itself would find it if its guest had taken it over."""

import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from alveole.host.qmp import connected
from alveole.model.error import AlveoleError
from alveole.model.instance import Resources
from alveole.runtime.base import Cell, Handle
from alveole.runtime.qemu.capture import monitor_socket
from alveole.runtime.qemu.jail import OVERHEAD_BYTES
from tests.integration.daemon import Daemon
from tests.runtime_world import CARD, IDS, World, execute, world

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]
MEMORY_BYTES = 512 << 20
_AS_QEMU = ("setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all")
_OWN = "status commands console words state control.in control.out"

Inside = Callable[[str], str]
"""What a shell script prints, errors too, that runs where QEMU does, as who it is."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def here() -> AsyncIterator[World]:
    async with world("qemu") as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def machine(here: World) -> tuple[Cell, Handle]:
    """One that runs; no test ends it."""
    runtime = here.reopen()
    cell = here.cell("sleep", "1000", resources=Resources(memory_bytes=MEMORY_BYTES, cpus=1))
    handle = await runtime.create(cell)
    await runtime.start(handle)
    return cell, handle


@pytest.fixture
def inside(machine: tuple[Cell, Handle]) -> Inside:
    return lambda script: run_as_qemu(machine[1].pid, script)


def run_as_qemu(pid: int, script: str) -> str:
    enter = ["nsenter", f"--target={pid}", "--all", "--setuid=0", "--setgid=0", "--wd=/"]
    done = subprocess.run(
        [*enter, *_AS_QEMU, "sh", "-c", f"exec 2>&1; {script}"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_it_is_nobody_with_no_privileges(machine: tuple[Cell, Handle]) -> None:
    status = status_of(machine[1].pid)
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(IDS.base)}
    assert not status["Groups"]
    assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["Seccomp_filters"]) == 2  # the engine's, and QEMU's own


async def test_every_namespace_is_another_than_the_hosts(machine: tuple[Cell, Handle]) -> None:
    kinds = ("user", "mnt", "pid", "ipc", "net", "uts", "cgroup")
    own, hosts = ([Path(f"/proc/{pid}/ns/{kind}").readlink() for kind in kinds] for pid in (machine[1].pid, "self"))
    assert not set(own) & set(hosts)


async def test_it_sees_programs_and_its_machine_and_no_more_of_the_host(inside: Inside) -> None:
    assert set(inside("ls -A /").split()) == {"bin", "dev", "lib", "lib64", "machine", "proc", "sys", "usr"}
    secret = Path("/etc/shadow")
    assert secret.exists()
    assert "No such file" in inside(f"cat {secret} /proc/1/root{secret}")
    assert "Permission denied" in inside("ls /machine")  # not even what there is of it


async def test_it_makes_files_nowhere_but_in_memory_of_its_own(inside: Inside) -> None:
    wide = "/usr /usr/bin /usr/lib /usr/share /bin /lib /lib64 /machine /machine/disks /machine/binds / /sys /proc"
    tried = f"for place in {wide}; do touch $place/made && echo came through: $place; done"
    assert "came through" not in inside(tried)
    each = "touch $1/made && rm $1/made && echo $1"
    found = inside(f"find /dev /machine/qmp /sys/fs/cgroup -type d -exec sh -c '{each}' - {{}} ';'").splitlines()
    made = {line for line in found if line.startswith("/")}
    assert "/machine/qmp" in made
    kinds = {line.split()[1]: line.split()[2] for line in inside("cat /proc/mounts").splitlines()}
    assert {kinds.get(path) for path in made - {"/machine/qmp", "/dev/net"}} <= {"tmpfs", "mqueue"}


async def test_every_mount_that_is_the_hosts_is_read_only_but_its_disk(inside: Inside) -> None:
    mounts = [line.split()[:4] for line in inside("cat /proc/mounts").splitlines()]
    writable = {target for _, target, _, options in mounts if "rw" in options.split(",")}
    nodes = {target for target in writable if target.startswith("/dev/")}
    assert writable - nodes == {"/machine", "/machine/disks/root", "/proc", "/dev", "/sys/fs/cgroup"}


async def test_its_own_files_can_be_written_but_not_replaced(inside: Inside) -> None:
    answer = inside(
        f"cd /machine; for name in {_OWN}; do test -w $name || echo lost $name; mv $name other && echo moved $name; "
        "rm -f $name; test -e $name || echo removed $name; ln -sf /usr/bin/true $name && echo linked $name; done"
    )
    assert not [line for line in answer.splitlines() if line.startswith(("lost", "moved", "removed", "linked"))]
    answer = inside("cd /machine; for name in kernel initramfs memory; do echo x >>$name && echo wrote $name; done")
    assert "wrote" not in answer


async def test_a_link_in_place_of_its_monitor_is_not_followed(machine: tuple[Cell, Handle], inside: Inside) -> None:
    place = machine[0].run_directory / "m"
    inside("cd /machine/qmp; mv socket kept; ln -s kept socket")
    try:
        with pytest.raises(AlveoleError, match="is no socket"):
            async with connected(monitor_socket(place), "it"):
                pass
    finally:
        inside("cd /machine/qmp; mv kept socket")
    async with connected(monitor_socket(place), "it") as monitor:
        assert (await monitor.execute("query-status"))["status"] == "running"


async def test_it_sees_no_other_process(inside: Inside) -> None:
    programs = inside("cat /proc/[0-9]*/comm").split()
    assert programs.count("qemu-system-x86") == 1
    assert set(programs) <= {"qemu-system-x86", "sh", "cat"}


async def test_it_sees_the_network_devices_of_its_machine_only(inside: Inside) -> None:
    devices = inside("ls /sys/class/net").split()
    assert sorted(devices) == sorted(["lo", CARD.device])
    assert "Operation not permitted" in inside("ip link add more type dummy")
    assert "Operation not permitted" in inside(f"ip address add 10.9.9.9/32 dev {CARD.device}")


async def test_it_opens_no_device_but_its_own(machine: tuple[Cell, Handle], inside: Inside) -> None:
    script = "for path in /dev/* /dev/net/*; do test -L $path || ! test -c $path -o -b $path || echo $path; done"
    nodes = set(inside(script).split())
    expected = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "net/tun")}
    uses_kvm = "\0kvm\0" in Path(f"/proc/{machine[1].pid}/cmdline").read_text()
    assert nodes == expected | ({"/dev/kvm"} if uses_kvm else set())
    assert "Operation not permitted" in inside("mknod /dev/disk b 254 0")


async def test_its_limits_are_those_of_the_machine(here: World, machine: tuple[Cell, Handle]) -> None:
    cell, handle = machine
    assert here.cgroups
    assert handle.pid in here.cgroups.processes(cell.cgroup)
    assert here.cgroups.usage(cell.cgroup).memory_limit_bytes == MEMORY_BYTES + OVERHEAD_BYTES
    assert limit(here, cell, "cpu", "cpu.cfs_quota_us", "cpu.max") == limit(
        here, cell, "cpu", "cpu.cfs_period_us", "cpu.max"
    )
    assert 0 < int(limit(here, cell, "pids", "pids.max", "pids.max")) <= 256


def limit(here: World, cell: Cell, controller: str, v1: str, v2: str) -> str:
    """The first word of a file of its cgroup, whichever tree this host has."""
    assert here.cgroups
    layout = here.cgroups.layout
    if mount := layout.v1.get(controller):
        return (mount / cell.cgroup / v1).read_text().strip()
    assert layout.v2
    words = (layout.v2 / cell.cgroup / v2).read_text().split()
    return words[1] if v1.endswith("period_us") else words[0]


async def test_the_instance_in_its_guest_is_contained_as_well(here: World, machine: tuple[Cell, Handle]) -> None:
    """Its root is not the guest's: neither the ports nor the disk can be opened, nor the kernel be touched."""
    script = (
        "ls /dev | grep -E 'vport|hvc|ttyS|vd|console'; for port in /sys/class/virtio-ports/*; do "
        "busybox mknod /tmp/node c $(busybox tr : ' ' <$port/dev) && echo exited 0 exited >/tmp/node && echo told; "
        "busybox rm -f /tmp/node; done; busybox mknod /tmp/node b $(busybox tr : ' ' </sys/block/vda/dev) && "
        "head -c 1 /tmp/node && echo read; echo c >/proc/sysrq-trigger && echo pulled; busybox reboot -f && echo reset"
    )
    _, stdout, stderr = await execute(here.reopen(), machine[1], "sh", "-c", script)
    assert not stdout, (stdout, stderr)
    assert stderr.count(b"not permitted") >= 3


async def test_two_machines_are_two_users_and_neither_reaches_the_others_disk(daemon: Daemon) -> None:
    names = ("one", "two")
    for name in names:
        daemon.ok("run", "-d", "--isolation", "vm", "--name", name, "busybox", "sleep", "1000", timeout=60)
    records = [daemon.instance(name) for name in names]
    pids = [record["status"]["pid"] for record in records]
    users = [status_of(pid)["Uid"].split()[0] for pid in pids]
    assert users[0] != users[1]
    disks = [sorted(daemon.run_dir.glob(f"storage/**/{record['id']}.img"))[0] for record in records]
    assert disks[0] != disks[1]
    for user, disk in zip(users, reversed(disks), strict=True):
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "cat", str(disk)]
        assert b"Permission denied" in subprocess.run(as_user, capture_output=True, check=False).stderr
    sees = run_as_qemu(pids[0], f"kill -0 {pids[1]} && echo signalled; cat {disks[1]}")
    assert "signalled" not in sees
    assert "No such file" in sees
