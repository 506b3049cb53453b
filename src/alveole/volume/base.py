"""The volume driver's contract: disks with a filesystem, in a pool of this node."""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from alveole.model.volume import Volume


class VolumeDriver(Protocol):
    """Every method is idempotent and can be killed at any point."""

    async def create(self, volume: Volume) -> None:
        """Make the disk and its filesystem. Raises EXHAUSTED when the pool is full."""
        ...

    async def ensure_mounted(self, volume: Volume) -> Path:
        """Mount it on this node, once, and say where. The caller binds it into instances."""
        ...

    async def ensure_unmounted(self, volume_id: str) -> None:
        """Unmount and detach it. Nothing happens if it is not mounted."""
        ...

    async def remove(self, volume_id: str) -> None:
        """Unmount and delete. Nothing happens if it does not exist."""
        ...

    async def recover(self, volumes: Collection[Volume]) -> None:
        """After a restart: remove disks of no volume in ``volumes`` and half-made ones."""
        ...

    async def close(self) -> None:
        """Give back what this driver holds on the host (pool mount) if no volume is mounted."""
        ...
