"""What tests of runtimes need around them: a root directory, namespaces, a cgroup parent, and cells made of these."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alveole.host.cgroup import Cgroups
from alveole.model.agent import ExecRequest, Stream
from alveole.runtime.base import Card, Cell, Handle, Ids, Process, Runtime
from alveole.runtime.capabilities import DEFAULT
from alveole.runtime.crun import Crun
from alveole.runtime.fake import FakeHost, FakeRuntime, Program
from alveole.runtime.oci import OciRuntime
from alveole.runtime.qemu.runtime import QemuRuntime
from alveole.runtime.runsc import Runsc
from alveole.runtime.runsc_capture import RunscRuntime

IDS = Ids(base=15 << 28)  # a window that no daemon is given
CARD = Card(
    device="tap0",
    mac="02:00:00:00:00:04",
    address="192.0.0.2",
    gateway="192.0.0.1",
    gateway_mac="02:00:00:00:00:03",
    control_address="169.254.0.2",
    control_gateway="169.254.0.1",
    has_route=False,
)
# Kept, since what machines begin from is made once; of one process of tests each, as of one daemon.
STATE = Path(tempfile.gettempdir(), f"machines-of-tests-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
APPLETS = "sh echo sleep cat ls id mount nc true false ps kill grep stty hostname test yes head dd touch ulimit df"
PATH = {"PATH": "/bin"}


@dataclass(kw_only=True)
class World:
    """One wall on this host. ``reopen`` gives a new Runtime, as after a restart of the daemon."""

    wall: str
    directory: Path
    cgroup: str
    root: Path | None = None
    user_namespace: Path | None = None
    network_namespace: Path | None = None
    cgroups: Cgroups | None = None
    fake: FakeHost | None = None
    cells: dict[str, Cell] = field(default_factory=dict)
    pins: list[Path] = field(default_factory=list)

    def reopen(self) -> Runtime:
        if self.fake:
            return FakeRuntime(self.fake)
        assert self.cgroups
        empty = self.directory / "empty"
        empty.mkdir(exist_ok=True)
        if self.wall == "qemu":
            return QemuRuntime(self.directory, STATE, self.cgroups)
        if self.wall == "runsc":
            return RunscRuntime(Runsc(empty), self.cgroups)
        return OciRuntime(Crun(self.directory), self.cgroups)

    def cell(self, *args: str, process: Mapping[str, Any] | None = None, **changes: Any) -> Cell:
        number = f"c{len(self.cells)}"
        directory, run_directory = self.directory / number, self.directory / f"{number}.run"
        directory.mkdir()
        run_directory.mkdir()
        shifted = self.wall in {"crun", "qemu"}
        defaults: dict[str, Any] = {
            "id": f"{self.cgroup[-8:]}{number}",
            "directory": directory,
            "run_directory": run_directory,
            "log_path": self.directory / f"{number}.log",
            "hostname": "cell",
            "root": self.root,
            "read_only": False,
            "cgroup": f"{self.cgroup}/{number}",
            "ids": IDS if shifted else None,
            "user_namespace": self.user_namespace if shifted else None,
            "network_namespace": self.network_namespace,
            "process": process_of(*args, **(process or {})),
        }
        if self.wall == "qemu":
            defaults |= self._machine(number)
        cell = Cell(**{**defaults, **changes})
        self.cells[cell.id] = cell
        return cell

    def _machine(self, number: str) -> dict[str, Any]:
        """A disk and a network of its own."""
        assert self.root
        disk = self.directory / f"{number}.img"
        options = ["-q", "-t", "ext4", "-E", "assume_storage_prezeroed=1"]
        make = ["mke2fs", *options, "-d", str(self.root), str(disk), "256M"]
        subprocess.run(make, check=True)
        namespace = self.directory / f"{number}.net"
        make_machine_network(namespace, self.user_namespace)
        self.pins.append(namespace)
        return {"network_namespace": namespace, "root_disk": disk, "card": CARD}


def make_machine_network(pin: Path, user_namespace: Path | None) -> None:
    """A network namespace whose tap leads nowhere but to it."""
    assert user_namespace
    pin.touch()
    make = ["nsenter", f"--user={user_namespace}", "unshare", "--net", "sh", "-c", "echo made; read _"]
    with subprocess.Popen(make, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "made\n"
        subprocess.run(["mount", "--bind", f"/proc/{holder.pid}/ns/net", pin], check=True)
    script = (
        f"ip tuntap add {CARD.device} mode tap user {IDS.base} vnet_hdr && ip link set {CARD.device} "
        f"address {CARD.gateway_mac} up && ip address add {CARD.control_gateway} peer {CARD.control_address} "
        f"dev {CARD.device}"
    )
    subprocess.run(["nsenter", f"--net={pin}", "sh", "-c", script], check=True)


def process_of(*args: str, **changes: Any) -> Process:
    defaults = {"args": args, "env": PATH, "workdir": "/", "uid": 0, "gid": 0, "capabilities": DEFAULT}
    return Process(**{**defaults, **changes})


@asynccontextmanager
async def world(wall: str, programs: Mapping[tuple[str, ...], Program] | None = None) -> AsyncIterator[World]:
    """A world whose cells are all deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="alveole-test") as name:
        directory = Path(name)
        directory.chmod(0o711)  # root inside, who is nobody here, must get through
        async with _world(wall, directory, programs or {}) as made:
            yield made


@asynccontextmanager
async def _world(wall: str, directory: Path, programs: Mapping[tuple[str, ...], Program]) -> AsyncIterator[World]:
    cgroup = f"alveole-test{os.getpid():x}{time.monotonic_ns():x}"
    if wall == "fake":
        host = FakeHost(clock=time.time, programs=programs, unknown=None)
        yield World(wall=wall, directory=directory, cgroup=cgroup, fake=host)
        return
    cgroups = Cgroups()
    cgroups.prepare(cgroup)
    try:
        with namespaces(directory) as (user, network):
            root = make_root(directory / "root", shifted=wall == "crun")
            here = World(
                wall=wall,
                directory=directory,
                cgroup=cgroup,
                root=root,
                user_namespace=user,
                network_namespace=network,
                cgroups=cgroups,
            )
            try:
                yield here
            finally:
                for cell in here.cells.values():
                    await delete(here.reopen(), cell)
                for pin in here.pins:
                    subprocess.run(["umount", pin], check=True)
    finally:
        cgroups.release(cgroup)


@contextmanager
def namespaces(directory: Path) -> Iterator[tuple[Path, Path]]:
    """A user namespace and a network namespace that belongs to it, pinned."""
    user, network = directory / "user", directory / "network"
    make = ["unshare", "--user", "--net", "sh", "-c", "echo made; read _"]
    with subprocess.Popen(make, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "made\n"
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{name}").write_text(f"0 {IDS.base} {IDS.size}")
        for path, kind in ((user, "user"), (network, "net")):
            path.touch()
            subprocess.run(["mount", "--bind", f"/proc/{holder.pid}/ns/{kind}", path], check=True)
    subprocess.run(["nsenter", f"--net={network}", "ip", "link", "set", "lo", "up"], check=True)
    try:
        yield user, network
    finally:
        for path in (user, network):
            subprocess.run(["umount", path], check=True)


def make_root(root: Path, *, shifted: bool) -> Path:
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in APPLETS.split():
        (root / "bin" / applet).symlink_to("busybox")
    for path in (root, *root.rglob("*")):
        os.lchown(path, *((IDS.base, IDS.base) if shifted else (0, 0)))
    return root


async def delete(runtime: Runtime, cell: Cell) -> None:
    await runtime.delete(cell.id, cell.directory, cell.run_directory, cell.cgroup)


async def collect(stream: Stream) -> tuple[bytes, bytes]:
    """All of (stdout, stderr)."""
    received = {1: b"", 2: b""}
    async for number, data in stream.output():
        received[number] += data
    return received[1], received[2]


async def run_to_end(runtime: Runtime, cell: Cell) -> tuple[int | None, bytes, bytes]:
    """(exit code, stdout, stderr) of a cell run once."""
    handle = await runtime.create(cell)
    stream = await runtime.attach(handle)
    await runtime.start(handle)
    stdout, stderr = await collect(stream)
    await stream.close()
    code = (await runtime.wait(handle)).code
    await delete(runtime, cell)
    return code, stdout, stderr


async def execute(runtime: Runtime, handle: Handle, *args: str, **changes: Any) -> tuple[int, bytes, bytes]:
    """(exit code, stdout, stderr) of a command run in an instance."""
    request = ExecRequest(command=args)
    stream = await runtime.exec(handle, request, process_of(*args, **changes))
    stdout, stderr = await collect(stream)
    code = await stream.wait()
    await stream.close()
    return code, stdout, stderr
