"""Reading files of a foreign root directory: symlinks in it lead nowhere else, and nothing in it can make us wait."""

import ctypes
import errno
import os
import stat
from pathlib import Path

_SYS_OPENAT2 = 437  # the same on all architectures
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def read_inside(root: Path, path: str, limit_bytes: int) -> bytes | None:
    """The first ``limit_bytes`` of the regular file ``path`` as a process with ``root`` for its root would find it.

    None if there is no such file. Raises OSError if the host cannot read it.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = _open_in_root(directory, path.lstrip("/"))
    finally:
        os.close(directory)
    if descriptor is None:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:  # noqa: PTH123  (of a descriptor)
            return file.read(limit_bytes)
    finally:
        os.close(descriptor)


def _open_in_root(directory: int, path: str) -> int | None:
    flags = os.O_PATH | os.O_CLOEXEC  # only looked at: opening a pipe may wait, opening a device may do anything
    how = _OpenHow(flags=flags, mode=0, resolve=_RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    descriptor = _libc.syscall(_SYS_OPENAT2, directory, os.fsencode(path), ctypes.byref(how), size)
    if descriptor >= 0:
        return int(descriptor)
    number = ctypes.get_errno()
    if number in _ABSENT:
        return None
    raise OSError(number, os.strerror(number), path)
