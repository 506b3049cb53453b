"""What the image store holds on disk.

    blobs/sha256/HEX    a manifest, configuration or layer as it came, by its sha256
    layers/HEX/fs       an unpacked layer, by the sha256 of its plain tar (its diff id)
    layers/HEX/layer.json   which blob it came from, and its size
    disks/HEX           a machine's disk, raw and sparse, by the sha256 of the file it was made from
    tmp/                one directory per operation under way

An object appears by one rename, complete and on disk, or not at all. A *key* is its path below the root.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from alveole.image.oci import Descriptor, layer_descriptor, parse_manifest
from alveole.model.error import AlveoleError, not_found
from alveole.model.image import ImageContent

_DIRECTORIES = ("blobs/sha256", "layers", "disks")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """``layer.json``."""

    blob_digest: str
    blob_bytes: int
    compression: str  # gzip | zstd | empty
    unpacked_bytes: int

    def descriptor(self) -> Descriptor:
        return layer_descriptor(self.blob_digest, self.blob_bytes, self.compression)


def blob_key(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def layer_key(diff_id: str) -> str:
    return f"layers/{diff_id.removeprefix('sha256:')}"


def disk_key(digest: str) -> str:
    return f"disks/{digest.removeprefix('sha256:')}"


class Shelf:
    """The directories. Its methods are short file operations; those that sync wait for the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.temporary = root / "tmp"

    def make(self) -> None:
        """Only root may enter: layers hold set-user-ID programs of anybody, disks their secrets."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root.chmod(0o700)
        for name in (*_DIRECTORIES, "tmp"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.root / key

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def keys(self) -> Iterator[str]:
        for directory in _DIRECTORIES:
            yield from (f"{directory}/{entry.name}" for entry in os.scandir(self.root / directory))

    def layer(self, diff_id: str) -> LayerRecord:
        """Raises AlveoleError(NOT_FOUND) if this layer is not here."""
        try:
            return LayerRecord(**json.loads((self.path(layer_key(diff_id)) / "layer.json").read_text()))
        except FileNotFoundError as error:
            raise not_found(f"layer {diff_id} is not in the image store", hint="pull its image again") from error

    def add_layer(self, diff_id: str, prepared: Path, record: LayerRecord) -> None:
        """Move in ``prepared``, whose ``fs`` is on disk already. Waits for the disk."""
        _write_durably(prepared / "layer.json", json.dumps(asdict(record)).encode())
        target = self.path(layer_key(diff_id))
        prepared.rename(target)
        _sync(target.parent)

    def add_blob(self, digest: str, file: Path) -> None:
        """Take in a verified file, which keeps its name too. Waits for the disk."""
        target = self.path(blob_key(digest))
        _sync(file)
        os.link(file, target)
        _sync(target.parent)

    def add_disk(self, digest: str, file: Path) -> None:
        """Move in a raw disk. Waits for the disk.

        Most filesystems here cannot share its blocks with the pool of volumes: there it is copied, once, as the base
        of all root disks of its image.
        """
        target = self.path(disk_key(digest))
        _sync(file)
        file.rename(target)
        _sync(target.parent)

    def needed_by(self, content: ImageContent) -> set[str]:
        """Keys of what an image is made of, as far as it is here."""
        if content.disk is not None:
            return {disk_key(content.digest)}
        keys = {blob_key(content.digest), *map(layer_key, content.layers)}
        keys |= {blob_key(blob.digest) for blob in self._manifest_blobs(content.digest)}
        present = [diff_id for diff_id in content.layers if self.has(layer_key(diff_id))]
        return keys | {blob_key(self.layer(diff_id).blob_digest) for diff_id in present}

    def size_bytes(self, key: str) -> int:
        """0 for what a failing operation has just taken back."""
        try:
            if key.startswith("layers/"):
                return self.layer(key.removeprefix("layers/")).unpacked_bytes
            status = self.path(key).stat()
            return status.st_blocks * 512 if key.startswith("disks/") else status.st_size
        except (FileNotFoundError, AlveoleError):
            return 0

    def _manifest_blobs(self, digest: str) -> tuple[Descriptor, ...]:
        """None if the manifest is not here, or has rotted on disk: a pull brings it and them again."""
        try:
            return parse_manifest(self.path(blob_key(digest)).read_bytes()).blobs
        except (FileNotFoundError, AlveoleError):
            return ()


def _write_durably(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
