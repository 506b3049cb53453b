"""The image store's contract: content-addressed layers and blobs of one node.

The names of images are records of the control plane; here only digests count.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, Protocol

from alveole.model.image import DiskFormat, ImageContent, Recipe

Progress = Callable[[str], None]
"""Called with a short line about what is being done now ("layer 2/5: 31 MB")."""

Format = Literal["oci-layout", "docker-archive", "rootfs"] | DiskFormat


class ImageStore(Protocol):
    """Every method is idempotent, verifies digests, and leaves nothing behind when it fails or is cancelled."""

    async def pull(self, reference: str, *, tls_verify: bool, progress: Progress) -> ImageContent:
        """From a registry. Raises NOT_FOUND (no such image), UNAVAILABLE (registry), DENIED, INVALID (corrupt)."""
        ...

    async def load(self, path: Path, format: Format, progress: Progress) -> ImageContent:  # noqa: A002
        """From an OCI layout directory (or tar of one), a docker-archive, a tarball of a root filesystem, or a disk."""
        ...

    async def build(
        self, recipe: Recipe, directory: Path, base: ImageContent | None, *, use_cache: bool, progress: Progress
    ) -> ImageContent:
        """From a recipe whose relative paths begin at ``directory``. ``base`` is its base image, if it names one."""
        ...

    async def has(self, content: ImageContent) -> bool:
        """Whether all layers are unpacked, or the disk is raw: ready."""
        ...

    def layer_directories(self, content: ImageContent) -> tuple[Path, ...]:
        """Unpacked layers, lowest first, ids as in the image (not shifted). Never written to. None of a disk."""
        ...

    def disk_path(self, content: ImageContent) -> Path:
        """The disk of content that is one: raw, sparse, in whole sectors. Never written to."""
        ...

    async def collect(self, used: Collection[ImageContent]) -> int:
        """Remove what none of ``used`` needs, except what is being fetched now. Returns the bytes freed."""
        ...
