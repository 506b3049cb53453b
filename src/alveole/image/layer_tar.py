"""Writes a layer's tar: from what a container changed, or from a recipe's files.

A program of its own, as reading and writing gigabytes has no place on an event loop:
``python -I -m alveole.image.layer_tar PARENT-PID OUTPUT`` reads a ``Changes`` or ``Files`` as JSON from its input.
Exit code 2: the recipe is at fault; the last line of standard error says how. Imports nothing heavy.
"""

import errno
import io
import json
import os
import stat
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from alveole.host.jail import die_with
from alveole.image.layer_path import resolve

EXIT_REFUSED = 2
_OPAQUE_XATTRS = ("user.overlay.opaque", "trusted.overlay.opaque")
_OVERLAY_XATTRS = ("user.overlay.", "trusted.")
_CAPABILITY_XATTR = "security.capability"
_CAPABILITY_REVISION_2, _CAPABILITY_REVISION_3 = 0x02, 0x03  # revision 3 adds the owning namespace's root id
_CAPABILITY_REVISION_2_BYTES = 20


class RefusedError(Exception):
    """The recipe asks for what cannot be. The text is shown to the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The upper directory of an overlay whose ids are ``base``..``base + size - 1``, as a layer with ids from 0.

    ``skip`` are absolute paths inside that the container saw as mounts: what lies there is only their mount points.
    """

    upper: str
    base: int
    size: int
    skip: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """``model.image.RecipeFile``s as JSON. Sources are relative to ``directory``; all times become ``mtime_s``.

    ``layers`` are the directories of the layers below, lowest first: a target behind one of their symbolic links
    (``/bin`` is ``/usr/bin``) is put where that leads, instead of hiding the link.
    """

    directory: str
    layers: list[str]
    files: list[dict[str, Any]]
    mtime_s: int


def write_changes(changes: Changes, output: BinaryIO) -> None:
    """Whiteouts become ``.wh.NAME``, opaque directories hold ``.wh..wh..opq``, hard links stay hard links."""
    upper = Path(changes.upper)
    skip = {path.strip("/") for path in changes.skip}
    seen: dict[int, str] = {}  # inode of a file with several names -> the first
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, status in _walk(upper):
            name = str(path.relative_to(upper))
            if name in skip or stat.S_ISSOCK(status.st_mode):
                continue
            if path.name.startswith(".wh."):
                raise RefusedError(f"/{name}: a layer cannot hold names that begin with .wh., which mean removed files")
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                tar.addfile(tarfile.TarInfo(str(PurePosixPath(name).with_name(f".wh.{path.name}"))))
                continue
            entry = _entry(name, path, status, linked_to=seen.get(status.st_ino, ""))
            entry.uid, entry.gid = (_unshifted(i, changes, name) for i in (status.st_uid, status.st_gid))
            attributes = {} if stat.S_ISLNK(status.st_mode) else _xattrs(path)
            entry.pax_headers = {
                f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")
                for key, value in kept_attributes(attributes)
            }
            _add(tar, entry, path)
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                seen.setdefault(status.st_ino, name)
            if any(attributes.get(key) == b"y" for key in _OPAQUE_XATTRS):
                tar.addfile(tarfile.TarInfo(f"{name}/.wh..wh..opq"))


def write_files(files: Files, output: BinaryIO) -> None:
    """Equal files give equal bytes. Raises RefusedError if a source is missing, escapes, or is no file or directory."""
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in files.files:
            for entry, source in _recipe_entries(file, files):
                entry.uid, entry.gid, entry.mtime = file["user"], file["group"], files.mtime_s
                _add(tar, entry, source)


def _recipe_entries(file: Mapping[str, Any], files: Files) -> Iterator[tuple[tarfile.TarInfo, Path | bytes]]:
    source = None if file["content"] is not None else _source(file["source"], Path(files.directory))
    layers = [Path(layer) for layer in files.layers]
    target = resolve(file["target"], layers, last=source is not None and source.is_dir())
    mode = int(file["mode"], 8) if file["mode"] else None
    if source is None:
        data = file["content"].encode()
        entry = tarfile.TarInfo(target)
        entry.size, entry.mode = len(data), 0o644 if mode is None else mode
        yield entry, data
        return
    for path, status in ((source, source.lstat()), *(_walk(source) if source.is_dir() else ())):
        name = str(PurePosixPath(target, path.relative_to(source)))
        if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            raise RefusedError(f"{path} is neither file, directory nor symbolic link")
        entry = _entry(name, path, status)
        if mode is not None and stat.S_ISREG(status.st_mode):
            entry.mode = mode
        yield entry, path


def _source(source: str, directory: Path) -> Path:
    """An absolute source may lie anywhere; one relative to the recipe's directory must stay in it, links followed."""
    try:
        path = (directory / source).resolve(strict=True)
    except OSError as error:
        raise RefusedError(f"source {source} of the recipe: {os.strerror(error.errno or errno.ENOENT)}") from error
    if not Path(source).is_absolute() and not path.is_relative_to(directory.resolve()):
        raise RefusedError(f"source {source} leads out of the recipe's directory, to {path}")
    return path


def _walk(top: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything below the directory ``top``, parents first, in the order of names, symbolic links not followed."""
    pending = sorted(top.iterdir(), reverse=True)
    while pending:
        path = pending.pop()
        status = path.lstat()
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            pending += sorted(path.iterdir(), reverse=True)


def _entry(name: str, path: Path, status: os.stat_result, *, linked_to: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.mode = stat.S_IMODE(status.st_mode)
    entry.mtime = int(status.st_mtime)
    if linked_to:
        entry.type, entry.linkname = tarfile.LNKTYPE, linked_to
    elif stat.S_ISDIR(status.st_mode):
        entry.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(status.st_mode):
        entry.type, entry.linkname = tarfile.SYMTYPE, str(path.readlink())
    elif stat.S_ISFIFO(status.st_mode):
        entry.type = tarfile.FIFOTYPE
    else:
        entry.size = status.st_size
    return entry


def _add(tar: tarfile.TarFile, entry: tarfile.TarInfo, source: Path | bytes) -> None:
    if not entry.isreg():
        tar.addfile(entry)
    elif isinstance(source, bytes):
        tar.addfile(entry, io.BytesIO(source))
    else:
        with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            tar.addfile(entry, file)


def _unshifted(host_id: int, changes: Changes, name: str) -> int:
    if not 0 <= host_id - changes.base < changes.size:
        raise RefusedError(f"/{name} belongs to id {host_id} of the host, which no process of the build has")
    return host_id - changes.base


def _xattrs(path: Path) -> dict[str, bytes]:
    return {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)}


def kept_attributes(attributes: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """The users' own attributes and file capabilities; those of overlayfs are none of the layer's."""
    for key, value in sorted(attributes.items()):
        if key == _CAPABILITY_XATTR:
            yield key, _of_any_namespace(value)
        elif key.startswith("user.") and not key.startswith(_OVERLAY_XATTRS):
            yield key, value


def _of_any_namespace(capability: bytes) -> bytes:
    """File capabilities without the id of the build's root, as they would be set outside a user namespace."""
    if len(capability) > _CAPABILITY_REVISION_2_BYTES and capability[3] == _CAPABILITY_REVISION_3:
        return capability[:3] + bytes([_CAPABILITY_REVISION_2]) + capability[4:_CAPABILITY_REVISION_2_BYTES]
    return capability


def main() -> int:
    die_with(int(sys.argv[1]))
    request = json.load(sys.stdin)
    try:
        with Path(sys.argv[2]).open("wb") as output:
            if "upper" in request:
                write_changes(Changes(**request), output)
            else:
                write_files(Files(**request), output)
    except RefusedError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    except OSError as error:
        sys.stderr.write(f"{error.filename or sys.argv[2]}: {error.strerror or error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
