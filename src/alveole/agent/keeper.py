"""Keeps one instance on this node as it was assigned: decides with ``policy.lifecycle``, acts, reports.

A keeper owns all that exists of its instance here. It may be cancelled (the daemon stops) or die with the daemon at
any point: what runs goes on, and the next keeper adopts it or removes what was half made.
"""

import asyncio
import logging
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from alveole.agent import cellmaker, plugging
from alveole.agent.engine import Engine
from alveole.agent.faults import is_full, told
from alveole.agent.health import watch_health
from alveole.agent.holders import Holder
from alveole.agent.mounts import hold_volumes
from alveole.agent.record import blank, load, note_begun, save
from alveole.agent.reporter import RETRY_S, Reporter
from alveole.agent.steps import StepLog
from alveole.host.blocking import in_thread
from alveole.model.agent import InstanceAssignment
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.health import Health
from alveole.model.instance import Desired, Instance, InstanceStatus, Phase
from alveole.policy.admission import signal_number
from alveole.policy.lifecycle import Prepare, Remove, Rest, Sleep, Start, Stop, backoff, decide, wants_restart
from alveole.runtime.base import Capability, Exit, Handle, State

log = logging.getLogger(__name__)
ATTACH_WAIT_S = 10.0
SLOW_S = 0.5  # a start that takes longer is reported while it is under way
UNKNOWN_EXIT_CODE = 255


class Keeper:
    def __init__(self, engine: Engine, instance_id: str, assignment: InstanceAssignment | None) -> None:
        """``assignment`` None: the instance is not this node's (any more): leave nothing of it."""
        self.id = instance_id
        self.made = asyncio.Event()  # a client may attach
        self.attached = asyncio.Event()  # a client has
        self.over: asyncio.Future[int] | None = None  # the exit code of the run under way, for who is attached
        self._engine = engine
        self._assignment = assignment
        self._changed = asyncio.Event()
        self._ended: asyncio.Task[Exit] | None = None
        self._health: asyncio.Task[None] | None = None
        self._steps = StepLog("adopt", engine.clock, engine.fault)
        self._reporter = Reporter(engine.link)
        found = load(engine.paths, instance_id)
        self._lost = found is None and engine.paths.home(instance_id).exists()
        self.local = found if found is not None else blank(engine.paths, instance_id, assignment)

    @property
    def handle(self) -> Handle | None:
        return self.local.handle

    @property
    def instance(self) -> Instance | None:
        return self._assignment.instance if self._assignment else None

    @property
    def is_running(self) -> bool:
        return self._ended is not None and not self._ended.done()

    @property
    def moment(self) -> str:
        """What it has still to be forked from; empty if nothing."""
        origin = self.instance.origin if self.instance else None
        return origin.moment if origin and not self.local.has_begun else ""

    def assign(self, assignment: InstanceAssignment | None) -> None:
        self._assignment = assignment
        self._changed.set()

    async def run(self) -> None:
        """Until the instance is gone from this node or the daemon stops."""
        try:
            async with self._engine.files[self.id]:
                await self._adopt()
            while await self._turn():
                continue
        finally:
            await self._cancel(self._health)
            await self._cancel(self._ended)
            self._health, self._ended = None, None

    async def _adopt(self) -> None:
        """Find what a former daemon left: go on with what runs, remove what was half made."""
        paths, local = self._engine.paths, self.local
        if self._lost:
            await self._give_up()
            return
        runtime = self._engine.runtimes.get(local.runtime)
        if runtime is None or not (local.starting or local.handle or local.attachment or local.asleep):
            return
        # Before anything is awaited: no keeper takes a volume until all have said what they hold.
        is_machine = Capability.MACHINE in runtime.capabilities
        holder = Holder(instance_id=self.id, name=local.name, is_machine=is_machine)
        self._engine.volume_holders.adopt(local.volumes, holder)
        if not (local.starting or local.handle or local.attachment):
            return  # it sleeps, and nobody else may change its volumes
        found = await runtime.recover(self.id, paths.runtime(self.id), paths.sockets(self.id))
        there = found.handle is not None and found.state in {State.RUNNING, State.EXITED}
        if found.handle is not None and found.state is State.RUNNING:
            await runtime.resume(found.handle)  # it stood still if that daemon died while it took a snapshot
        if there and local.starting:  # the daemon died between starting it and remembering that
            self.local = local.replace(handle=found.handle)
            await self._note_started(local.restarts)
        elif there and found.handle is not None and local.status.phase is Phase.RUNNING:
            self._follow(found.handle)
        elif local.status.phase is Phase.RUNNING and not local.starting:
            await self._note_vanished("host restarted")
        else:
            await self._unmake()

    async def _give_up(self) -> None:
        """Its record is lost, and with that its network: what may still run cannot be adopted."""
        self._lost = False
        if self.local.status.phase is Phase.RUNNING:
            await self._note_vanished("record lost")
        await self._unmake()

    async def _note_vanished(self, reason: str) -> None:
        now = self._engine.clock.now().timestamp()
        await self._note_ended(Exit(code=None, reason=reason, finished_at=now))

    async def _turn(self) -> bool:
        """One decision and what follows. False when nothing of the instance is left."""
        self._changed.clear()
        if self._ended is not None and self._ended.done():
            await self._report(self.local.status)  # that it ran, with the steps of its start, if not told yet
            self._steps = StepLog("end", self._engine.clock, self._engine.fault)
            await self._note_ended(self._ended.result())
        if self._assignment is None:
            await self._abandon()
            return False
        instance = self._assignment.instance
        now = self._engine.clock.now()
        action = decide(instance, self.local.status, running=self._ended is not None, now=now)
        match action:
            case Start(restarts):
                await self._interruptible(self._start(self._assignment, restarts))
            case Stop(grace_s):
                await self._interruptible(self._stop(instance, grace_s))
            case Sleep():
                await self._sleep()
            case Prepare():
                await self._prepare(instance)
            case Remove():
                await self._remove()
                return False
            case Rest(phase, until):
                if self.local.asleep and instance.desired is Desired.STOPPED:
                    self._remember(self.local.status, asleep=False)
                    await cellmaker.forget_origin(self._engine, self.id)
                    await self._unmake()
                if phase is Phase.RUNNING and plugging.differs(self._engine, self._assignment, self.local):
                    await self._replug(self._assignment)
                else:
                    await self._report(self.local.status.replace(phase=phase))
                    await self._rest(until)
        return True

    async def _rest(self, until: datetime | None) -> None:
        """Wait for a new assignment, the end of its process, or the time."""
        delay_s = max(0.0, (until - self._engine.clock.now()).total_seconds()) if until else None
        changed = asyncio.ensure_future(self._changed.wait())
        waits: set[asyncio.Future[Any]] = {changed} | ({self._ended} if self._ended else set())
        try:
            await asyncio.wait(waits, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _interruptible(self, action: Coroutine[Any, Any, None]) -> None:
        """Carry out an action, but give it up when a new assignment asks for something else."""
        task = asyncio.ensure_future(action)
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({task, changed}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()
        finally:
            changed.cancel()
            await self._cancel(task)

    # --- start -------------------------------------------------------------------------------------------------------

    async def _start(self, assignment: InstanceAssignment, restarts: int) -> None:
        instance = assignment.instance
        self._steps = StepLog("start", self._engine.clock, self._engine.fault)
        slow = asyncio.ensure_future(self._report_slow())
        try:
            async with self._engine.starts, self._engine.files[self.id]:  # in this order: a fork waits for its origin
                await self._make(assignment, restarts)
            if instance.spec.attach and restarts == 0:
                await self._await_client()
            assert self.local.handle is not None  # noqa: S101  (_make has set it)
            with self._steps.step("start"):
                await self._note_goes_on(instance)
                await self._runtime.start(self.local.handle)
            await self._note_started(restarts)
        except AlveoleError as error:
            await self._note_failed(instance, restarts, error)
        except OSError as error:
            await self._note_failed(instance, restarts, told(error))
        except asyncio.CancelledError:
            await asyncio.shield(self._unmake())
            raise
        finally:
            await self._cancel(slow)

    async def _make(self, assignment: InstanceAssignment, restarts: int) -> None:
        hold_volumes(self._engine, assignment)  # or be refused, before being written down as a holder
        self.local = self.local.replace(
            starting=True,
            volumes=tuple(volume.id for volume in assignment.volumes),
            run=assignment.instance.run,
            restarts=restarts,
            project=assignment.instance.project,
            name=assignment.instance.name,
            runtime=assignment.instance.spec.isolation,
        )
        async for record in cellmaker.make(self._engine, assignment, self.local, self._steps):
            self.local = record
            save(self._engine.paths, record)
        self._await_end()

    def _await_end(self) -> None:
        self.over = asyncio.get_running_loop().create_future()
        self.made.set()

    def _tell_end(self, outcome: int | AlveoleError) -> None:
        """Tell who is attached how it ended. Nobody may be."""
        if self.over is None or self.over.done():
            return
        if isinstance(outcome, AlveoleError):
            self.over.set_exception(outcome)
            self.over.exception()  # heard by nobody is no fault
        else:
            self.over.set_result(outcome)

    async def _await_client(self) -> None:
        """A client that asked for all output attaches now; one that died meanwhile does not hold the instance up."""
        try:
            async with asyncio.timeout(ATTACH_WAIT_S):
                await self.attached.wait()
        except TimeoutError:
            log.warning("no client attached to %s within %g s; starting it", self.local.name, ATTACH_WAIT_S)

    async def _note_goes_on(self, instance: Instance) -> None:
        """From now on its disk is no more what it was with the memory that was kept: if this fails, it boots."""
        if not self.local.has_begun and (instance.origin is not None or self.local.renewal):
            await in_thread(partial(note_begun, self._engine.paths, self.id, self.local.renewal))
        if self.local.asleep or (instance.origin is not None and not self.local.has_begun):
            self._remember(self.local.status, has_begun=True, asleep=False)

    async def _report_slow(self) -> None:
        await asyncio.sleep(SLOW_S)
        await self._report(self.local.status.replace(phase=Phase.CREATING))

    async def _note_started(self, restarts: int) -> None:
        instance = self.instance
        assert self.local.handle is not None  # noqa: S101  (only a made instance starts)
        status = InstanceStatus(
            phase=Phase.RUNNING,
            run=self.local.run,
            pid=self.local.handle.pid,
            started_at=self._engine.clock.now(),
            restarts=restarts,
            health=Health.STARTING if instance and cellmaker.health_check(instance) else None,
            machine=self._machine(),
        )
        self._remember(status, starting=False, has_begun=True, asleep=False)
        await cellmaker.forget_origin(self._engine, self.id)
        self._follow(self.local.handle)

    async def _note_failed(self, instance: Instance, restarts: int, error: AlveoleError) -> None:
        log.warning("instance %s could not be started: %s", instance.name, error)
        self._tell_end(error)
        await self._unmake()
        now = self._engine.clock.now()
        code = 127 if error.code is ErrorCode.INVALID else None
        status = InstanceStatus(
            phase=Phase.FAILED,
            run=instance.run,
            restarts=restarts,
            finished_at=now,
            exit_code=code,
            error={"code": error.code.value, "message": error.message, "hint": error.hint, "field": error.field},
        )
        self._remember(status.replace(next_start_at=backoff(status, now)))
        await self._report(self.local.status)

    # --- running -----------------------------------------------------------------------------------------------------

    def _follow(self, handle: Handle) -> None:
        """Watch the process, and its health if it has a check."""
        if not self.made.is_set():
            self._await_end()
        self.local = self.local.replace(handle=handle)
        self._engine.captures.running[self.id] = handle
        self._ended = asyncio.ensure_future(self._runtime.wait(handle))
        instance = self.instance
        check = cellmaker.health_check(instance) if instance else None
        if instance is not None and check is not None:
            self._health = asyncio.ensure_future(
                watch_health(self._engine, self._runtime, handle, instance, check=check, note=self._note_health)
            )

    async def _note_health(self, health: Health, output: str) -> None:
        self.local = self.local.replace(status=self.local.status.replace(health=health, health_output=output))
        await self._report(self.local.status)

    async def _stop(self, instance: Instance, grace_s: float) -> None:
        self._steps = StepLog("stop", self._engine.clock, self._engine.fault)
        handle, ended = self.local.handle, self._ended
        if handle is None or ended is None:
            return
        if grace_s > 0 and not ended.done():
            name = instance.spec.stop_signal or cellmaker.stop_signal(instance) or "SIGTERM"
            with self._steps.step("signal"):
                await self._runtime.signal(handle, signal_number(name))
                await asyncio.wait({ended}, timeout=grace_s)
        if not ended.done():
            with self._steps.step("kill"):
                await self._runtime.kill(handle)
                await asyncio.wait({ended})
        await self._note_ended(ended.result(), stopped=True)

    async def _sleep(self) -> None:
        """Put it on disk. If that fails it goes on, and the control plane is told why."""
        self._steps = StepLog("sleep", self._engine.clock, self._engine.fault)
        status = self.local.status
        assert self.local.handle is not None  # noqa: S101  (it runs)
        try:
            with self._steps.step("capture"):
                await cellmaker.put_to_sleep(self._engine, self._runtime, self.local.handle)
        except (AlveoleError, OSError) as error:
            await self._note_refused(error)
            return
        await self._cancel(self._health)
        await self._cancel(self._ended)
        self._health, self._ended = None, None
        self._engine.captures.running.pop(self.id, None)
        self._remember(status.replace(phase=Phase.ASLEEP, pid=None, health=None), asleep=True)
        await self._unmake()

    async def _prepare(self, instance: Instance) -> None:
        """Let it be asleep from the beginning."""
        self._steps = StepLog("prepare", self._engine.clock, self._engine.fault)
        self.local = self.local.replace(run=instance.run)
        try:
            async with self._engine.files[self.id]:
                with self._steps.step("capture"):
                    await cellmaker.prepare_asleep(self._engine, instance)
        except (AlveoleError, OSError) as error:
            known = error if isinstance(error, AlveoleError) else told(error)
            await self._note_failed(instance, 0, known)
        else:
            status = InstanceStatus(phase=Phase.ASLEEP, run=instance.run)
            self._remember(status, asleep=True, has_begun=True)

    async def _replug(self, assignment: InstanceAssignment) -> None:
        """Give it the volumes it shall have. If that fails, the control plane is told why, and takes that back."""
        self._steps = StepLog("replug", self._engine.clock, self._engine.fault)
        assert self.local.handle is not None  # noqa: S101  (it runs)
        try:
            with self._steps.step("volumes"):
                changes = plugging.replug(self._engine, self._runtime, assignment, self.local, self.local.handle)
                async with self._engine.files[self.id]:
                    async for record in changes:
                        self.local = record
                        save(self._engine.paths, record)
        except (AlveoleError, OSError) as error:
            await self._note_refused(error)

    async def _note_refused(self, error: AlveoleError | OSError) -> None:
        """It goes on as it is; what was asked of it is not tried again at once."""
        known = error if isinstance(error, AlveoleError) else told(error)
        log.warning("instance %s stays as it is: %s", self.local.name, known)
        problem = {"code": known.code.value, "message": known.message, "hint": known.hint}
        await self._report(self.local.status.replace(error=problem))
        await self._rest(self._engine.clock.now() + timedelta(seconds=RETRY_S))

    async def _note_ended(self, end: Exit, *, stopped: bool = False) -> None:
        """The process is over: remember how, then give back what it used, unless it starts again."""
        await self._cancel(self._health)
        self._health, self._ended = None, None
        self._engine.captures.running.pop(self.id, None)
        finished_at = datetime.fromtimestamp(end.finished_at, tz=UTC)
        status = self.local.status.replace(
            phase=Phase.EXITED,
            pid=None,
            finished_at=finished_at,
            exit_code=end.code,
            reason="stopped" if stopped and end.reason != "out of memory" else end.reason,
            health=None,
        )
        self._remember(status.replace(next_start_at=backoff(status, finished_at)))
        self._tell_end(UNKNOWN_EXIT_CODE if end.code is None else end.code)
        instance = self.instance
        again = (
            instance is not None
            and instance.desired is Desired.RUNNING
            and (instance.run != status.run or wants_restart(instance.spec.restart, self.local.status))
        )
        self.made.clear()
        if again:
            await self._runtime_delete()
        else:
            await self._unmake()

    # --- end ---------------------------------------------------------------------------------------------------------

    async def _remove(self) -> None:
        self._steps = StepLog("remove", self._engine.clock, self._engine.fault)
        self.local = self.local.replace(asleep=False)
        await self._unmake()
        with self._steps.step("files"):
            await self._remove_files()
        await self._report(self.local.status, removed=True)

    async def _abandon(self) -> None:
        """It is not this node's any more: end it without grace, leave nothing."""
        if self._ended is not None and self.local.handle is not None:
            await self._runtime.kill(self.local.handle)
            await asyncio.wait({self._ended})
        self.local = self.local.replace(asleep=False)
        await self._unmake()
        await self._remove_files()

    async def _remove_files(self) -> None:
        async with self._engine.files[self.id]:
            await cellmaker.remove_files(self._engine, self.local)
        self._engine.files.pop(self.id, None)

    async def _unmake(self) -> None:
        await cellmaker.unmake(self._engine, self.local, self._steps)
        self._forget_made()

    def _forget_made(self) -> None:
        self.made.clear()
        if self._engine.paths.home(self.id).exists():
            volumes = self.local.volumes if self.local.asleep else ()
            self._remember(self.local.status, handle=None, attachment=None, volumes=volumes, starting=False)

    async def _runtime_delete(self) -> None:
        await cellmaker.delete_runtime(self._engine, self.local, self._steps)
        self._remember(self.local.status, handle=None)

    # --- records -----------------------------------------------------------------------------------------------------

    @property
    def _runtime(self) -> Any:
        return self._engine.runtimes[self.local.runtime]

    def _machine(self) -> dict[str, Any] | None:
        if self.local.handle is None or Capability.MACHINE not in self._runtime.capabilities:
            return None
        return dict(self._runtime.describe(self.local.handle))

    def _remember(self, status: InstanceStatus, **fields: Any) -> None:
        """On a full disk the older record stays: the next daemon concludes the rest from what it finds."""
        self.local = self.local.replace(status=status, **fields)
        try:
            self._engine.paths.home(self.id).mkdir(parents=True, exist_ok=True)
            save(self._engine.paths, self.local)
        except OSError as error:
            if not is_full(error):
                raise
            log.warning("what became of instance %s could not be written down: %s", self.local.name, told(error))

    async def _report(self, status: InstanceStatus, *, removed: bool = False) -> None:
        instance = self.instance
        if instance is not None and not await self._reporter.send(instance, status, self._steps.steps, removed=removed):
            self.assign(None)

    @staticmethod
    async def _cancel(task: "asyncio.Future[Any] | None") -> None:
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task})
