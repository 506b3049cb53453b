"""What an instance wrote to its root: kept with a moment of it, and given to who begins from that.

A machine's is a disk of the volume driver, by a name; that of other walls is a directory, kept in the moment's.
"""

from pathlib import Path

from alveole.agent.record import Paths
from alveole.host.process import run
from alveole.host.tree import copy_tree
from alveole.model.error import conflict
from alveole.runtime.base import Capability, Runtime
from alveole.volume.base import VolumeDriver

UPPER = "upper"
_TIMEOUT_S = 3600.0


async def keep_root(
    paths: Paths, volumes: VolumeDriver, runtime: Runtime, instance_id: str, *, disk: str, moment: Path
) -> None:
    """Nobody may write to it meanwhile. Raises CONFLICT if the instance has never run."""
    if Capability.MACHINE in runtime.capabilities:
        await volumes.copy_root_disk(instance_id, disk)
        return
    upper = paths.upper(instance_id)
    if not upper.exists():
        raise conflict("the instance has never run: there is nothing to keep of it")
    await copy_tree(upper, moment / UPPER)


async def give_root(
    paths: Paths,
    volumes: VolumeDriver,
    runtime: Runtime,
    instance_id: str,
    *,
    disk: str,
    moment: Path,
    ids_base: int,
) -> None:
    """Replace what the instance has, at once, when all is there. ``ids_base``: the range of ids of its files."""
    if Capability.MACHINE in runtime.capabilities:
        await volumes.copy_root_disk(disk, instance_id, replace=True)
        return
    upper = paths.upper(instance_id)
    new = upper.with_name(f"{UPPER}.new")
    await remove_tree(new)
    await copy_tree(moment / UPPER, new, ids_base=ids_base)
    await remove_tree(upper)
    new.rename(upper)


async def remove_tree(directory: Path) -> None:
    """By a child: a large one takes long. Nothing happens if it is not there."""
    if directory.exists():
        await run(["rm", "-rf", "--one-file-system", "--", str(directory)], timeout_s=_TIMEOUT_S)
