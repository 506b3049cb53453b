"""Runs the health check of one instance as long as it runs."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from alveole.agent.cell import process_of
from alveole.agent.engine import Engine
from alveole.model.agent import ExecRequest
from alveole.model.error import AlveoleError
from alveole.model.health import Health, HealthCheck
from alveole.model.instance import Instance
from alveole.policy.health import HealthState, judge
from alveole.runtime.base import Handle, Process, Runtime

OUTPUT_LIMIT_BYTES = 1024
START_INTERVAL_S = 0.5
"""How often it is asked until it answers for the first time: a service is ready sooner than its interval."""


async def watch_health(
    engine: Engine,
    runtime: Runtime,
    handle: Handle,
    instance: Instance,
    *,
    check: HealthCheck,
    note: Callable[[Health, str], Awaitable[None]],
) -> None:
    """Run the check at its interval until cancelled; ``note`` hears of each change of health."""
    state = HealthState()
    began = engine.clock.monotonic()
    own = process_of(instance, engine.paths.root(instance.id))
    process = replace(own, args=check.command, tty=False, stdin=False)
    while True:
        starting = state.health is Health.STARTING
        await asyncio.sleep(min(check.interval_s, START_INTERVAL_S) if starting else check.interval_s)
        running_s = engine.clock.monotonic() - began
        passed, output = await run_check(runtime, handle, check, process)
        if starting and not passed and running_s < check.interval_s:
            continue  # asked ahead of its first interval: only an answer counts
        after = judge(state, check, passed=passed, running_s=running_s)
        if after.health is not state.health:
            await note(after.health, output)
        state = after


async def run_check(runtime: Runtime, handle: Handle, check: HealthCheck, process: Process) -> tuple[bool, str]:
    """Whether the command ended with 0 in time, and the beginning of what it said."""
    request = ExecRequest(command=check.command)
    try:
        async with asyncio.timeout(check.timeout_s):
            stream = await runtime.exec(handle, request, process)
            try:
                said = b""
                async for _, data in stream.output():
                    said = (said + data)[:OUTPUT_LIMIT_BYTES]
                return await stream.wait() == 0, said.decode(errors="replace")
            finally:
                await stream.close()
    except TimeoutError:
        return False, f"no answer within {check.timeout_s:g} s"
    except AlveoleError as error:
        return False, error.message
