"""What the API asks of this node directly: exec, attach, logs, stats, signals of its instances; its templates."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from alveole.agent import changes, templates
from alveole.agent.cell import CONSOLE, process_of
from alveole.agent.cellmaker import cgroup_of
from alveole.agent.engine import Engine
from alveole.agent.keeper import Keeper
from alveole.agent.session import Agent
from alveole.host.blocking import in_thread
from alveole.host.cgroup_usage import memory_of
from alveole.model.agent import Changes, ExecRequest, InstanceStats, LogLine, Stream
from alveole.model.error import conflict, unsupported
from alveole.model.instance import Instance
from alveole.model.snapshot import Snapshot
from alveole.model.template import Template
from alveole.policy.lifecycle import is_settled
from alveole.runtime.base import Capability, Handle, Process, Runtime
from alveole.runtime.logfile import read_log
from alveole.runtime.passwd import resolve_user

KEEPER_POLL_S = 0.005
START_WAIT_S = 30.0  # longer than an engine may take to start


class LocalStreams:
    """``model.agent.NodeStreams`` for the agent in the same process."""

    def __init__(self, engine: Engine, agent: Agent) -> None:
        self._engine = engine
        self._agent = agent

    async def exec(self, instance: Instance, request: ExecRequest) -> Stream:
        handle, runtime = await self._running(instance), self._runtime(instance, Capability.EXEC)
        return await runtime.exec(handle, request, self._exec_process(instance, request))

    def _exec_process(self, instance: Instance, request: ExecRequest) -> Process:
        if instance.is_system:
            return replace(CONSOLE, args=request.command, env=request.env, tty=request.tty, stdin=request.stdin)
        root = self._engine.paths.root(instance.id)
        process = process_of(instance, root)
        process = replace(
            process,
            args=request.command,
            env={**process.env, **({"TERM": "xterm"} if request.tty else {}), **request.env},
            workdir=request.workdir or process.workdir,
            tty=request.tty,
            stdin=request.stdin,
        )
        if request.user is None:
            return process
        user = resolve_user(root, request.user)
        return replace(process, uid=user.uid, gid=user.gid, groups=user.groups)

    async def attach(self, instance: Instance) -> Stream:
        """Waits until the instance is made; the caller gives up when its operation fails."""
        runtime = self._runtime(instance, Capability.ATTACH)
        keeper = await self._keeper(instance)
        await keeper.made.wait()
        handle, over = keeper.handle, keeper.over
        if handle is None or over is None:
            raise conflict(f"instance {instance.name} is not running")
        stream = await runtime.attach(handle)
        keeper.attached.set()
        return _Attached(stream, over)

    async def _keeper(self, instance: Instance) -> Keeper:
        """Wait for an instance that was placed a moment ago to reach this agent."""
        while instance.id not in self._agent.keepers:  # noqa: ASYNC110  (a matter of milliseconds, and rare)
            await asyncio.sleep(KEEPER_POLL_S)
        return self._agent.keepers[instance.id]

    def logs(self, instance: Instance, *, follow: bool, tail: int | None, since: str | None) -> AsyncIterator[LogLine]:
        def finished() -> bool:
            keeper = self._agent.keepers.get(instance.id)
            if keeper is None or keeper.instance is None:
                return True
            return is_settled(keeper.instance, keeper.local.status)

        return read_log(self._engine.paths.log(instance.id), follow=follow, tail=tail, since=since, finished=finished)

    async def stats(self, instance: Instance) -> InstanceStats:
        await self._running(instance)
        cgroup = cgroup_of(self._engine, instance.id)
        cgroups = self._engine.cgroups
        usage = cgroups.usage(cgroup)
        memory = await in_thread(lambda: memory_of(cgroups.processes(cgroup)))
        received, sent = self._traffic(instance)
        return InstanceStats(
            name=instance.name,
            cpu_s=usage.cpu_s,
            memory_bytes=usage.memory_bytes,
            memory_limit_bytes=usage.memory_limit_bytes,
            pss_bytes=memory.pss_bytes,
            own_bytes=memory.own_bytes,
            shared_bytes=memory.shared_bytes,
            pids=usage.pids,
            received_bytes=received,
            sent_bytes=sent,
            read_bytes=usage.io_read_bytes,
            written_bytes=usage.io_write_bytes,
        )

    def _traffic(self, instance: Instance) -> tuple[int | None, int | None]:
        """What the host's end of its veth sent is what the instance received."""
        attachment = self._agent.keepers[instance.id].local.attachment
        if attachment is None or not attachment.interface:
            return None, None
        statistics = Path("/sys/class/net") / attachment.interface / "statistics"
        received, sent = (int((statistics / name).read_text()) for name in ("tx_bytes", "rx_bytes"))
        return received, sent

    async def changes(self, instance: Instance) -> Changes:
        return await changes.of_instance(self._engine, instance)

    async def snapshot_changes(self, snapshot: Snapshot) -> Changes:
        return await changes.of_snapshot(self._engine, snapshot)

    async def templates(self) -> tuple[Template, ...]:
        keepers = self._agent.keepers.values()
        handles = [keeper.handle for keeper in keepers if keeper.handle is not None and keeper.is_running]
        return await templates.shown(self._engine, handles)

    async def signal(self, instance: Instance, signal: int) -> None:
        await self._engine.runtimes[instance.spec.isolation].signal(await self._running(instance), signal)

    async def _running(self, instance: Instance) -> Handle:
        """Its handle. What writes its first line may not be known to run yet: that takes some milliseconds more."""
        keeper = self._agent.keepers.get(instance.id)
        deadline_s = self._engine.clock.monotonic() + START_WAIT_S
        while keeper is not None and keeper.handle is not None and keeper.local.starting:
            if self._engine.clock.monotonic() > deadline_s:
                break
            await asyncio.sleep(KEEPER_POLL_S)
        if keeper is None or keeper.handle is None or not keeper.is_running:
            raise conflict(
                f"instance {instance.name} is not running ({instance.status.phase})",
                hint=f"start it: alveole start {instance.name}",
            )
        return keeper.handle

    def _runtime(self, instance: Instance, needed: Capability) -> Runtime:
        runtime = self._engine.runtimes[instance.spec.isolation]
        if needed not in runtime.capabilities:
            raise unsupported(f"isolation {instance.spec.isolation} cannot {needed}")
        return runtime


class _Attached:
    """An attached stream whose exit code is the instance's, as the keeper saw it."""

    def __init__(self, stream: Stream, over: "asyncio.Future[int]") -> None:
        self._stream = stream
        self._over = over

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close_stdin(self) -> None:
        await self._stream.close_stdin()

    async def resize(self, rows: int, columns: int) -> None:
        await self._stream.resize(rows, columns)

    def output(self) -> AsyncIterator[tuple[int, bytes]]:
        return self._stream.output()

    async def wait(self) -> int:
        return await asyncio.shield(self._over)

    async def close(self) -> None:
        await self._stream.close()
