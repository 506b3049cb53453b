"""Placing the entries of a layer in a directory tree whose root is ``/``: runs in the jail, after chroot.

Links are resolved by the kernel, which cannot leave the jail's root. Whiteouts become what overlayfs reads:
a character device 0/0 hides a name of the layers below, ``user.overlay.opaque`` all names of a directory.
"""

# ruff: noqa: PTH101, PTH102, PTH108, PTH112, PTH211
# (a layer has a hundred thousand names, which are hostile: plain strings, read literally)

import errno
import os
import shutil
import stat
import tarfile
from typing import IO

from alveole.image.tape import Limits, RefusedError

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_AUFS = ".wh..wh."  # other bookkeeping of AUFS, which means nothing elsewhere
_OPAQUE_ATTRIBUTE = "user.overlay.opaque"
_XATTR_HEADER = "SCHILY.xattr."
_CHUNK_BYTES = 1 << 20
_HIGHEST_ID = 65535
_NAME_BYTES = 255


class Tree:
    """The layer being made. One ``place`` per entry in the archive's order, then ``finish``."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries = 0
        self._directory_times: dict[str, int] = {}  # ns; set last, as writing into a directory changes its time

    def place(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        """Raises RefusedError naming the entry if it is malformed, not allowed, or the filesystem refuses it."""
        self._entries += 1
        if self._entries > self._limits.entries:
            raise RefusedError(f"it has more than {self._limits.entries} entries")
        try:
            self._place(member, archive)
        except RefusedError as error:
            raise RefusedError(f"entry {_shown(member.name)}: {error}") from error
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise RefusedError(f"entry {_shown(member.name)}: {error.strerror or error}") from error
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise RefusedError(f"entry {_shown(member.name)}: {error}") from error

    def finish(self) -> None:
        for path, time_ns in self._directory_times.items():
            if _is_directory(path):
                os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)

    def _place(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        path = self._path(member.name)
        _check_header(member)
        name = path.rpartition("/")[2]
        if name.startswith(_WHITEOUT):
            self._place_whiteout(path, name)
            return
        if member.size > self._limits.file_bytes:
            raise RefusedError(f"its size is {member.size} bytes; {self._limits.file_bytes} are allowed")
        self._make_room(path, keep_directory=member.isdir())
        self._create(path, member, archive)
        if not member.islnk():  # a hard link has the metadata of its target
            _set_metadata(path, member)
        if member.isdir():
            self._directory_times[path] = _time_ns(member)

    def _path(self, name: str) -> str:
        """The absolute path in the jail. A leading ``/`` and ``.`` parts mean nothing, as everywhere."""
        if "\0" in name or "\n" in name:
            raise RefusedError("its name holds a NUL or a newline")
        parts = [part for part in name.split("/") if part not in {"", "."}]
        if ".." in parts:
            raise RefusedError("its name holds '..'")
        if len(os.fsencode(name)) > self._limits.path_bytes or len(parts) > self._limits.path_depth:
            raise RefusedError("its path is too long or too deep")
        if any(len(os.fsencode(part)) > _NAME_BYTES for part in parts):
            raise RefusedError(f"a part of its path is longer than {_NAME_BYTES} bytes")
        return "/" + "/".join(parts)

    def _create(self, path: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        if member.isdir():
            _make_directory(path)
        elif member.issym():
            os.symlink(member.linkname, path)
        elif member.isfifo():
            os.mkfifo(path)
        elif member.islnk():
            _link(self._path(member.linkname), path)
        elif member.isreg():
            _write_file(path, member, archive)
        elif member.ischr() and (member.devmajor, member.devminor) == (0, 0):
            _hide(path)
        elif member.isdev():
            raise RefusedError("device nodes are not allowed; an instance gets its own /dev")
        else:
            raise RefusedError(f"its type {member.type!r} is unknown")

    def _place_whiteout(self, path: str, name: str) -> None:
        """What this layer itself holds at a hidden name stays: a whiteout is about the layers below."""
        parent = path[: -len(name)]
        self._ensure_directory(parent.rstrip("/"))
        if name == _OPAQUE:
            os.setxattr(parent, _OPAQUE_ATTRIBUTE, b"y")
        elif not name.startswith(_AUFS):
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in {"", ".", ".."}:
                raise RefusedError("it is a whiteout of nothing")
            self._hide_below(parent + hidden)

    def _hide_below(self, path: str) -> None:
        if not os.path.lexists(path):
            _hide(path)
        elif _is_directory(path):
            os.setxattr(path, _OPAQUE_ATTRIBUTE, b"y")

    def _make_room(self, path: str, *, keep_directory: bool) -> None:
        """Make the parents, and remove what an earlier entry left at ``path``."""
        if path == "/":
            if not keep_directory:
                raise RefusedError("it replaces the root directory")
            return
        self._ensure_directory(path.rpartition("/")[0])
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(mode):
            if not (keep_directory and _is_whiteout(path)):  # a directory over a whiteout: see _make_directory
                os.unlink(path)
        elif not keep_directory:
            shutil.rmtree(path)

    def _ensure_directory(self, path: str) -> None:
        """Directories that no entry names belong to root. Existing links to directories are followed."""
        if path == "" or os.path.isdir(path):
            return
        self._ensure_directory(path.rpartition("/")[0])
        _make_directory(path)
        os.chmod(path, 0o755)  # noqa: S103  (what every root filesystem has)


def _check_header(member: tarfile.TarInfo) -> None:
    for kind, number in (("owner", member.uid), ("group", member.gid)):
        if not 0 <= number <= _HIGHEST_ID:
            raise RefusedError(f"its {kind} {number} is not in 0..{_HIGHEST_ID}")
    for header in member.pax_headers:
        attribute = header.removeprefix(_XATTR_HEADER)
        if header.startswith(_XATTR_HEADER) and attribute.startswith(("trusted.", "user.overlay.")):
            raise RefusedError(f"its attribute {attribute!r} is the overlay filesystem's own")


def _make_directory(path: str) -> None:
    """Where a whiteout was, the new directory hides what the layers below have there."""
    hides = _is_whiteout(path)
    if hides:
        os.unlink(path)
    if not _is_directory(path):
        os.mkdir(path)
    if hides:
        os.setxattr(path, _OPAQUE_ATTRIBUTE, b"y")


def _link(target: str, path: str) -> None:
    """A hard link to a symbolic link is one more name of that link, never of what it points to."""
    if _is_whiteout(target):
        raise RefusedError("it links to a whiteout")
    os.link(target, path, follow_symlinks=False)


def _write_file(path: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    source = archive.extractfile(member)
    if source is None:
        raise RefusedError("it has no content")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as target:
        for offset, length in getattr(member, "sparse", None) or ((0, member.size),):
            source.seek(offset)
            target.seek(offset)
            _copy(source, target, length)
        target.truncate(member.size)


def _copy(source: IO[bytes], target: IO[bytes], length: int) -> None:
    while length > 0:
        data = source.read(min(length, _CHUNK_BYTES))
        if not data:
            raise RefusedError("its content is truncated")
        target.write(data)
        length -= len(data)


def _hide(path: str) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def _set_metadata(path: str, member: tarfile.TarInfo) -> None:
    """Owner first: changing it clears set-user-ID bits and file capabilities."""
    os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if not (member.issym() or member.ischr()):
        os.chmod(path, member.mode & 0o7777)
    if member.isreg() or member.isdir():
        _set_attributes(path, member)
    time_ns = _time_ns(member)
    os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)


def _set_attributes(path: str, member: tarfile.TarInfo) -> None:
    """Only file capabilities and user attributes: others, such as SELinux labels, belong to the host of their maker."""
    for header, value in member.pax_headers.items():
        attribute = header.removeprefix(_XATTR_HEADER)
        if header.startswith(_XATTR_HEADER) and (attribute == "security.capability" or attribute.startswith("user.")):
            os.setxattr(path, attribute, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)


def _time_ns(member: tarfile.TarInfo) -> int:
    return round(member.mtime * 1_000_000_000)


def _is_directory(path: str) -> bool:
    """Unlike ``os.path.isdir``, false for a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_whiteout(path: str) -> bool:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _shown(name: str) -> str:
    """A hostile name, fit for one line of a message."""
    return repr(name if len(name) <= 200 else f"{name[:200]}...")
