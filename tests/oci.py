"""OCI image layouts made from files in pure Python, for tests of any tier."""

import gzip
import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backports import zstd

BUSYBOX = Path("/usr/bin/busybox")
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())

Entry = bytes | Path | None | tarfile.TarInfo
"""Of a path in a layer: content (mode 0755), a host file to copy, None for a directory, or a header without content."""

Layer = Mapping[str, Entry] | bytes
"""Files, or a finished blob: a tar, plain or compressed."""


def make_tar(files: Mapping[str, Entry]) -> bytes:
    """A reproducible plain tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, entry in files.items():
            header, content = _header(name, entry)
            archive.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def busybox_files() -> dict[str, Entry]:
    """A root filesystem with a shell: a static busybox under the names of its common applets."""
    applets = ("sh", "ls", "cat", "echo", "sleep", "id", "env", "true", "false", "mount", "httpd", "nc", "wget", "ps")
    return {
        "bin": None,
        "bin/busybox": BUSYBOX,
        **{f"bin/{name}": symlink(f"bin/{name}", "busybox") for name in applets},
        "etc": None,
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
        "tmp": directory("tmp", 0o1777),
    }


def symlink(name: str, target: str) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname, header.mode = tarfile.SYMTYPE, target, 0o777
    return header


def directory(name: str, mode: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.mode = tarfile.DIRTYPE, mode
    return header


def make_layout(
    directory: Path,
    layers: Sequence[Layer],
    config: Mapping[str, Any],
    *,
    diff_ids: Sequence[str] | None = None,
    architecture: str = ARCHITECTURE,
) -> str:
    """Write an OCI layout with one image; return its manifest's digest.

    ``config`` is the image configuration's ``config`` part (Entrypoint, Cmd, Env...). Layers given as files are
    compressed with gzip. ``diff_ids`` says what the image claims; by default the truth.
    """
    blobs = [layer if isinstance(layer, bytes) else gzip.compress(make_tar(layer), mtime=0) for layer in layers]
    document = {
        "architecture": architecture,
        "os": "linux",
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids or map(_diff_id, blobs))},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _descriptor(directory, json.dumps(document).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [
            _descriptor(directory, blob, f"application/vnd.oci.image.layer.v1.tar{_compression(blob)}")
            for blob in blobs
        ],
    }
    index = _descriptor(directory, json.dumps(manifest).encode(), str(manifest["mediaType"]))
    index["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [index]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return str(index["digest"])


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _header(name: str, entry: Entry) -> tuple[tarfile.TarInfo, bytes]:
    if isinstance(entry, tarfile.TarInfo):
        return entry, b""
    header = tarfile.TarInfo(name)
    header.mode = 0o755
    if entry is None:
        header.type = tarfile.DIRTYPE
        return header, b""
    content = entry.read_bytes() if isinstance(entry, os.PathLike) else entry
    header.size = len(content)
    return header, content


def _diff_id(blob: bytes) -> str:
    match _compression(blob):
        case "+gzip":
            return digest_of(gzip.decompress(blob))
        case "+zstd":
            return digest_of(zstd.decompress(blob))
        case _:
            return digest_of(blob)


def _compression(blob: bytes) -> str:
    return {b"\x1f\x8b": "+gzip", b"\x28\xb5": "+zstd"}.get(blob[:2], "")


def _descriptor(layout: Path, data: bytes, media_type: str) -> dict[str, Any]:
    digest = digest_of(data)
    path = layout / "blobs" / digest.replace(":", "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}
