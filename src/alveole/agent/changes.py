"""What an instance wrote to its root, beside what its image holds."""

import json
import sys
from pathlib import Path

from alveole.agent.engine import Engine
from alveole.host import upper_diff
from alveole.host.process import run
from alveole.model.agent import Change, Changes
from alveole.model.error import conflict
from alveole.model.image import ImageContent
from alveole.model.instance import Instance
from alveole.model.snapshot import Snapshot
from alveole.runtime.base import Capability

LIMIT = 10_000
_TIMEOUT_S = 600.0


async def of_instance(engine: Engine, instance: Instance) -> Changes:
    """Raises CONFLICT for a wall whose files the host does not look into."""
    _refuse_machine(engine, instance.spec.isolation)
    return await _found(engine, instance.image, engine.paths.upper(instance.id))


async def of_snapshot(engine: Engine, snapshot: Snapshot) -> Changes:
    """Raises CONFLICT as ``of_instance``."""
    _refuse_machine(engine, snapshot.spec.isolation)
    return await _found(engine, snapshot.image, engine.paths.snapshot(snapshot.id) / "upper")


def _refuse_machine(engine: Engine, isolation: str) -> None:
    if Capability.MACHINE in engine.runtimes[isolation].capabilities:
        raise conflict(
            f"the disk of a {isolation} holds a file system that it may have forged: this host does not look into it",
            hint="look from inside a copy of it: alveole copy, alveole snapshot fork",
        )


async def _found(engine: Engine, image: ImageContent | None, upper: Path) -> Changes:
    layers = engine.images.layer_directories(image) if image is not None else ()
    argv = [sys.executable, "-ISs", upper_diff.__file__, str(LIMIT), str(upper), *map(str, reversed(layers))]
    told = [json.loads(line) for line in (await run(argv, timeout_s=_TIMEOUT_S)).text.splitlines()]
    return Changes(
        changes=tuple(
            Change(kind=kind, path=path, mode=mode, size_bytes=size, changed_ns=changed)
            for kind, path, mode, size, changed in (line for line in told if line is not None)
        ),
        complete=None not in told,
    )
