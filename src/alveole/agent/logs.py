"""Logs of instances: kept to a bounded size while they are written."""

import logging
from collections.abc import Collection
from pathlib import Path

from alveole.agent.engine import Engine
from alveole.agent.keeper import Keeper
from alveole.model.error import AlveoleError

log = logging.getLogger(__name__)
MAX_LOG_BYTES = 16 << 20
KEPT_LOGS = 3
"""Older files beside the current one: LOG.1 is the youngest of them."""


async def rotate_large_logs(engine: Engine, keepers: Collection[Keeper]) -> None:
    for keeper in keepers:
        path = engine.paths.log(keeper.id)
        if keeper.handle is None or not path.exists() or path.stat().st_size < MAX_LOG_BYTES:
            continue
        shift(path)
        try:
            await engine.runtimes[keeper.local.runtime].rotate_logs(keeper.handle, path)
        except AlveoleError as error:
            log.warning("could not rotate the log of %s: %s", keeper.local.name, error)


def shift(path: Path) -> None:
    """LOG becomes LOG.1, LOG.1 becomes LOG.2 and so on; the oldest goes."""
    names = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, KEPT_LOGS + 1))]
    for older, younger in zip(reversed(names), reversed(names[:-1]), strict=False):
        if younger.exists():
            younger.rename(older)
