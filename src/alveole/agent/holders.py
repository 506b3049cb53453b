"""Who holds the volumes of this node: either the node, for many containers and sandboxes, or one machine.

Two kernels that write to one disk destroy its filesystem.
"""

from collections.abc import Collection
from dataclasses import dataclass

from alveole.model.error import conflict
from alveole.model.volume import Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    instance_id: str
    name: str  # of the instance
    is_machine: bool  # has the disk itself, and so alone; others have a bind of the node's mount


class VolumeHolders:
    def __init__(self) -> None:
        self._holders: dict[str, dict[str, Holder]] = {}  # by volume id, then by instance id

    def take(self, volumes: Collection[Volume], holder: Holder) -> None:
        """Hold all of them, or raise CONFLICT naming one and who has it. Nothing happens for those held already."""
        for volume in volumes:
            for other in self._holders.get(volume.id, {}).values():
                if other.instance_id != holder.instance_id and (other.is_machine or holder.is_machine):
                    raise conflict(
                        f"volume {volume.name} is held by instance {other.name}"
                        + (", a machine, which has it alone" if other.is_machine else ": a machine needs it alone"),
                        hint=f"alveole stop {other.name}, or use another volume",
                    )
        self.adopt({volume.id for volume in volumes}, holder)

    def adopt(self, volume_ids: Collection[str], holder: Holder) -> None:
        """Remember what it held before this daemon was."""
        for volume_id in volume_ids:
            self._holders.setdefault(volume_id, {})[holder.instance_id] = holder

    def others(self, volume_id: str, instance_id: str) -> list[str]:
        """Names of other instances that hold it."""
        held = self._holders.get(volume_id, {})
        return sorted(holder.name for holder in held.values() if holder.instance_id != instance_id)

    def release(self, volume_id: str, instance_id: str) -> bool:
        """Let go, if it held it at all. Whether nobody holds it now."""
        holders = self._holders.get(volume_id, {})
        holders.pop(instance_id, None)
        if not holders:
            self._holders.pop(volume_id, None)
        return not holders
