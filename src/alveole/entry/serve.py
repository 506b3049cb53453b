"""The daemon: puts the parts together, runs them, and ends them without touching an instance."""

import asyncio
import gc
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import anyio
import uvicorn

from alveole import __version__
from alveole.agent.engine import Engine
from alveole.agent.record import Paths
from alveole.agent.session import Agent
from alveole.agent.steps import FaultHook
from alveole.agent.streams import LocalStreams
from alveole.api.app import make_app
from alveole.api.service import Service
from alveole.control.cache import Cache
from alveole.control.commit import Context
from alveole.control.nodes import LocalLink
from alveole.control.reconcile import Reconciler
from alveole.entry.listen import listen
from alveole.entry.testing import fault_hook, guard_loop, watch_commits
from alveole.host import mount
from alveole.host.blocking import in_thread
from alveole.host.cgroup import Cgroups
from alveole.host.identity import Identity, load_identity
from alveole.host.reserve import Reserve
from alveole.image.node import NodeImages
from alveole.model.error import AlveoleError, ErrorCode, internal
from alveole.model.instance import Isolation
from alveole.model.node import Node
from alveole.network.routed import RoutedNetwork
from alveole.runtime.base import Capability, Runtime
from alveole.runtime.crun import Crun
from alveole.runtime.oci import OciRuntime
from alveole.runtime.qemu.runtime import QemuRuntime
from alveole.runtime.runsc import Runsc
from alveole.runtime.runsc_capture import RunscRuntime
from alveole.store.sqlite import SqliteStore
from alveole.volume.disk import DiskVolumes

log = logging.getLogger("alveole")
RESERVE_EVERY_S = 5.0


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()


class SystemIds:
    def hex(self, digits: int) -> str:
        return secrets.token_hex((digits + 1) // 2)[:digits]


class Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: the daemon decides when it ends."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    state: Path
    run: Path
    socket: Path
    group: str | None
    node: str


def run(state: Path, run_dir: Path, socket: Path, group: str | None, node: str | None) -> None:
    """Run the daemon until SIGTERM or SIGINT. Exits with 1 and one clear line if it cannot start."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    os.umask(0o022)
    if sys.version_info < (3, 12):  # 3.12 chooses it by itself; without, each child costs a thread
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
    options = Options(state=state, run=run_dir, socket=socket, group=group, node=node or os.uname().nodename)
    try:
        asyncio.run(_serve(options))
    except AlveoleError as error:
        sys.exit(f"alveole serve: {error}")
    except BaseExceptionGroup as faults:
        refused, others = faults.split(AlveoleError)
        if others is not None or refused is None:
            raise
        sys.exit(f"alveole serve: {_first(refused)}")


def _first(group: BaseExceptionGroup[AlveoleError]) -> BaseException:
    """The error that ended the others."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _serve(options: Options) -> None:
    if os.geteuid() != 0:
        raise AlveoleError(ErrorCode.DENIED, "the daemon needs root", hint="sudo alveole serve")
    identity = load_identity(options.state, options.run)
    store_path = options.state / "store.db"
    _refuse_lost_store(store_path)
    reserve = Reserve(options.state / "reserve")
    reserve.ensure()
    store = await SqliteStore.open(store_path, give_way=reserve.release)
    try:
        async with _host(identity) as cgroups:
            await _run_halves(options, identity, store, cgroups, reserve)
    finally:
        await store.close()


def _refuse_lost_store(path: Path) -> None:
    """With an empty store, all that runs and every volume of this state directory would be leftovers to remove."""
    kept = (path.parent / "instances", path.parent / "volumes")
    lost = not path.exists() or path.stat().st_size == 0
    if lost and any(directory.is_dir() and any(directory.iterdir()) for directory in kept):
        raise internal(
            f"store {path} is gone, but {path.parent} holds instances or volumes",
            hint="put back a backup of it, or begin with an empty state directory",
        )


@asynccontextmanager
async def _host(identity: Identity) -> AsyncIterator[Cgroups]:
    """What the daemon needs of the host as a whole, given back at the end if no instance needs it."""
    await mount.ensure_shared(identity.run)
    cgroups = Cgroups()
    cgroups.prepare(identity.cgroup)
    try:
        yield cgroups
    finally:
        await in_thread(partial(cgroups.release, identity.cgroup))
        if not any((identity.run / "i").glob("*")):
            await mount.unmount(identity.run)
            _tidy(identity.run)


def _tidy(run: Path) -> None:
    """Remove the empty directories and links of a run directory that nothing needs any more."""
    for path in run.iterdir():
        if path.is_symlink():
            path.unlink()
    for directory, _, _ in os.walk(run, topdown=False):
        with suppress(OSError):  # not empty: it is somebody else's
            Path(directory).rmdir()


async def _run_halves(
    options: Options, identity: Identity, store: SqliteStore, cgroups: Cgroups, reserve: Reserve
) -> None:
    fault = fault_hook()
    watch_commits(store, fault)
    cache = Cache(store)
    context = Context(store=store, cache=cache, clock=SystemClock(), ids=SystemIds(), pool=identity.pool, space=reserve)
    engine = await _engine(options, identity, cgroups, context, fault)
    agent = Agent(engine)
    service = Service(context=context, streams=LocalStreams(engine, agent), node=options.node, version=__version__)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with asyncio.TaskGroup() as group:
            ready = asyncio.Event()
            tasks = [group.create_task(cache.run(ready), name="cache")]
            await ready.wait()
            tasks.append(group.create_task(agent.run(), name="agent"))
            tasks.append(group.create_task(Reconciler(context).run(), name="reconcile"))
            tasks.append(group.create_task(_keep(reserve), name="reserve"))
            await agent.synced.wait()
            with listen(options.socket, options.group) as sock:
                config = _server_config(service)
                config.load()
                server = Server(config)
                serving = group.create_task(server.serve(sockets=[sock]), name="api")
                async with anyio.create_task_group():
                    pass  # it loads its asyncio half on first use, which would hold the first stream's loop for 100 ms
                gc.collect()
                gc.freeze()  # what was imported stays: looking through it again would hold the loop for 20 ms and more
                guard_loop()
                log.info("ready: %s, state %s, node %s", options.socket, options.state, options.node)
                await stop.wait()
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # streams cut off now are no faults
                server.should_exit = True
                await serving
            for task in tasks:
                task.cancel()
    finally:
        keep = agent.holds_instances()
        await engine.network.close(keep=keep)
        await engine.volumes.close()
        log.info("stopped; %s", "instances go on" if keep else "nothing is left running")


async def _engine(options: Options, identity: Identity, cgroups: Cgroups, context: Context, fault: FaultHook) -> Engine:
    """The drivers of this node. This is the only place that names them."""
    empty = options.run / "empty"
    empty.mkdir(exist_ok=True, mode=0o555)
    machines = QemuRuntime(options.run, options.state / "qemu", cgroups)
    await machines.open(identity.cgroup)
    runtimes: dict[str, Runtime] = {
        Isolation.CONTAINER: OciRuntime(Crun(options.run), cgroups),
        Isolation.SANDBOX: RunscRuntime(Runsc(empty), cgroups),
        Isolation.VM: machines,
    }
    lacking = {isolation: await runtime.probe() for isolation, runtime in runtimes.items()}
    images = NodeImages(options.state / "images", identity)
    await images.open()
    network = RoutedNetwork(identity)
    await network.open()
    return Engine(
        link=LocalLink(context),
        node=_node(options.node, lacking, runtimes, context),
        identity=identity,
        paths=Paths(options.state, options.run),
        clock=context.clock,
        runtimes=runtimes,
        images=images,
        network=network,
        volumes=DiskVolumes(identity, options.state / "volumes"),
        cgroups=cgroups,
        fault=fault,
    )


def _node(name: str, lacking: dict[str, str], runtimes: dict[str, Runtime], context: Context) -> Node:
    return Node(
        name=name,
        cpus=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        isolations=tuple(isolation for isolation, reason in lacking.items() if not reason),
        plugs=tuple(name for name, runtime in runtimes.items() if Capability.MACHINE in runtime.capabilities),
        forks=tuple(name for name, runtime in runtimes.items() if Capability.FORK in runtime.capabilities),
        lacking={isolation: reason for isolation, reason in lacking.items() if reason},
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        registered_at=context.clock.now(),
    )


async def _keep(reserve: Reserve) -> None:
    """Take the reserve again as soon as there is room for it."""
    while True:
        await in_thread(reserve.ensure)
        await asyncio.sleep(RESERVE_EVERY_S)


def _server_config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service),
        http="httptools",
        ws="websockets-sansio",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
