"""The volume driver's contract: disks with a filesystem, in a pool of this node.

Disks of volumes, mounted on the node or given to one machine; and root disks of machines, which are copies of base
disks, one for each image.
"""

from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Protocol

from alveole.model.volume import Volume

ROOT_DISK_BYTES = 10 << 30
"""How large root disks are if nobody says otherwise. They are sparse: only what is written takes space."""


class VolumeDriver(Protocol):
    """Every method is idempotent and can be killed at any point."""

    async def create(self, volume: Volume) -> None:
        """Make the disk and its filesystem. Raises EXHAUSTED when the pool is full."""
        ...

    async def ensure_mounted(self, volume: Volume) -> Path:
        """Mount it on this node, once, and say where. The caller binds it into instances.

        Raises CONFLICT while a machine has it.
        """
        ...

    async def ensure_unmounted(self, volume_id: str) -> None:
        """Unmount and detach it. Nothing happens if it is not mounted."""
        ...

    async def ensure_disk(self, volume: Volume) -> Path:
        """Its raw disk, checked, for one machine, which may be given the file by another name or owner.

        Raises CONFLICT while it is mounted on this node or another machine has it.
        """
        ...

    async def remove(self, volume_id: str) -> None:
        """Unmount and delete. Nothing happens if it does not exist."""
        ...

    async def base_disk(self, key: str, make: Callable[[Path], Awaitable[None]], *, need_bytes: int = 0) -> Path:
        """The disk that root disks of one image are copies of, by the hexadecimal digits of the image's digest.

        If it is not there, ``make`` makes it at the path it is given, whole and on disk when it returns; once, however
        many ask. ``need_bytes`` is about what that will take: without so much space it is refused, EXHAUSTED, before
        anything is written.
        """
        ...

    async def root_disk(self, instance_id: str, base: Path) -> Path:
        """The instance's own root disk, kept until removed: at first a copy of ``base`` that shares its blocks.

        Only root reaches it by its path. Owner and mode are the caller's to set. Raises EXHAUSTED when the pool is
        full, NOT_FOUND if neither it nor ``base`` is there.
        """
        ...

    async def copy_root_disk(self, source_id: str, instance_id: str, *, replace: bool = False) -> Path:
        """The root disk of ``instance_id``: if it is not there, a copy of another's, as that is on disk now.

        The other's machine must stand still. ``replace``: also if it is there; what it holds is lost, all at once.
        Raises as ``root_disk``.
        """
        ...

    async def keep_volume(self, volume_id: str, copy_id: str) -> None:
        """Keep, among the root disks, a copy of a volume as it is now: as after a power cut if somebody writes.

        Nothing happens if it is kept already. Raises NOT_FOUND if the volume has no disk here.
        """
        ...

    async def restore_volume(self, copy_id: str, volume: Volume) -> None:
        """The disk of a volume, new or not, with what was kept; what it holds is lost, all at once.

        Raises CONFLICT while something has it, NOT_FOUND if nothing was kept by that name.
        """
        ...

    async def remove_root_disk(self, instance_id: str) -> None:
        """Nothing happens if there is none; no machine may be using it."""
        ...

    async def collect_bases(self, used_keys: Collection[str]) -> int:
        """Remove the base disks of images that are not among ``used_keys``; bytes they took.

        Root disks that were copied from them keep the blocks they share with them.
        """
        ...

    async def recover(self, volumes: Collection[Volume], instances: Collection[str]) -> None:
        """After a restart: remove disks of no volume and no instance (by id) of these, and half-made ones."""
        ...

    async def close(self) -> None:
        """Give back what this driver holds on the host (pool mount) if no volume is mounted."""
        ...
