"""The whole image store of a node: what is fetched and what is built share layers."""

from pathlib import Path

from alveole.host.identity import UID_WINDOW_SIZE, Identity
from alveole.image.base import Progress
from alveole.image.build import Builder
from alveole.image.store import LocalImageStore
from alveole.model.image import ImageContent, Recipe


class NodeImages(LocalImageStore):
    """Implements alveole.image.base.ImageStore."""

    def __init__(self, root: Path, identity: Identity) -> None:
        # The window's last id is of the range of builds, and none that they use.
        super().__init__(root, converter_id=identity.uid_base + UID_WINDOW_SIZE - 1)
        self._builder = Builder(self, root / "build", identity)

    async def open(self) -> None:
        """Remove what a killed predecessor left half made."""
        await super().open()
        await self._builder.recover()

    async def build(
        self, recipe: Recipe, directory: Path, base: ImageContent | None, *, use_cache: bool, progress: Progress
    ) -> ImageContent:
        return await self._builder.build(recipe, directory, base, use_cache=use_cache, progress=progress)
