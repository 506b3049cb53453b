"""The Linux system calls that Python's standard library lacks. Each raises OSError.

They release the interpreter lock while the kernel works, so that a thread may wait in them.
"""

import ctypes
import os
from pathlib import Path

AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_NOATIME = 1024
MS_PRIVATE = 1 << 18
MS_SHARED = 1 << 20

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4
MOUNT_ATTR_IDMAP = 0x00100000

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40

# Numbers above 423 are the same on all architectures.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _checked(result: int, what: str | Path) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(what))
    return result


def mount(source: str | Path, target: Path, filesystem: str, flags: int, options: str) -> None:
    """mount(2) of a new filesystem; ``options`` beyond 4,095 bytes are cut by the kernel, so callers check."""
    result = _libc.mount(os.fsencode(source), os.fsencode(target), filesystem.encode(), flags, os.fsencode(options))
    _checked(result, target)


def set_propagation(target: Path, propagation: int) -> None:
    """Whether what is mounted and unmounted below ``target`` from now on happens in other mount namespaces too."""
    _checked(_libc.mount(None, os.fsencode(target), None, propagation, None), target)


def umount(target: Path, flags: int) -> None:
    _checked(_libc.umount2(os.fsencode(target), flags), target)


def open_tree_clone(descriptor: int, *, recursive: bool) -> int:
    """A detached copy of the mount at an open path, from there down. It is gone when closed, unless moved."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    return _checked(_libc.syscall(_SYS_OPEN_TREE, descriptor, b"", flags), f"open_tree of descriptor {descriptor}")


def mount_setattr(tree: int, attributes: int, *, user_namespace: int = 0, recursive: bool) -> None:
    """Set mount attributes, and always private propagation, on a detached mount."""
    attr = _MountAttr(attr_set=attributes, attr_clr=0, propagation=MS_PRIVATE, userns_fd=user_namespace)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    size = ctypes.c_size_t(ctypes.sizeof(attr))
    result = _libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", flags, ctypes.byref(attr), size)
    _checked(result, f"mount_setattr of descriptor {tree}")


def move_mount(tree: int, target: int) -> None:
    """Attach a detached mount at an open path."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _checked(_libc.syscall(_SYS_MOVE_MOUNT, tree, b"", target, b"", flags), f"move_mount to descriptor {target}")


def punch_hole(file: Path, *, keep_bytes: int) -> None:
    """Give back what the file takes, except for its last bytes. Its size stays. Raises OSError for a symlink."""
    descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        length = os.fstat(descriptor).st_size - keep_bytes
        if length > 0:
            flags = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
            _checked(_libc.fallocate(descriptor, flags, 0, length), file)
    finally:
        os.close(descriptor)
