"""Give a tree of files another range of 65,536 ids, run as a child: ``python -I -S shift_ids.py TREE BASE``.

The range that its files have now is that of TREE itself. Ids of no such range are left as they are. What the kernel
takes away from a file that gets another owner is given back: its set-id bits and its capabilities, whose root id is in
the range too (struct vfs_ns_cap_data, revision 3, linux/capability.h).
"""

import os
import stat
import struct
import sys
from contextlib import suppress

_RANGE = 1 << 16
_CAPABILITIES = "security.capability"
_REVISION_3, _REVISION_MASK = 0x03000000, 0xFF000000
_ROOT_ID_AT = 20


def shift(tree: str, base: int) -> None:
    old = os.lstat(tree).st_uid & ~(_RANGE - 1)
    if old == base:
        return
    for directory, _, files in os.walk(tree, topdown=False, onerror=_fail):
        for name in (*files, *_links(directory)):
            _shift_one(os.path.join(directory, name), old, base)  # noqa: PTH118  (a Path for each would double the time)
        _shift_one(directory, old, base)


def _links(directory: str) -> list[str]:
    """Links to directories, which ``os.walk`` lists among the directories and does not enter."""
    return [entry.name for entry in os.scandir(directory) if entry.is_symlink() and entry.is_dir()]


def _fail(error: OSError) -> None:
    raise error


def _shift_one(path: str, old: int, base: int) -> None:
    status = os.lstat(path)
    uid, gid = (_moved(number, old, base) for number in (status.st_uid, status.st_gid))
    if (uid, gid) == (status.st_uid, status.st_gid):
        return  # another name of a file that was moved, or none of the range
    capabilities = b""
    if stat.S_ISREG(status.st_mode):
        with suppress(OSError):  # it has none
            capabilities = os.getxattr(path, _CAPABILITIES)
    os.lchown(path, uid, gid)
    if not stat.S_ISLNK(status.st_mode) and status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        os.chmod(path, stat.S_IMODE(status.st_mode))  # noqa: PTH101
    if capabilities:
        os.setxattr(path, _CAPABILITIES, _moved_capabilities(capabilities, old, base))


def _moved(number: int, old: int, base: int) -> int:
    return number - old + base if old <= number < old + _RANGE else number


def _moved_capabilities(value: bytes, old: int, base: int) -> bytes:
    (magic,) = struct.unpack_from("<I", value)
    if magic & _REVISION_MASK != _REVISION_3:
        return value
    (root,) = struct.unpack_from("<I", value, _ROOT_ID_AT)
    return value[:_ROOT_ID_AT] + struct.pack("<I", _moved(root, old, base))


if __name__ == "__main__":
    try:
        shift(sys.argv[1], int(sys.argv[2]))
    except OSError as failure:  # a path that is too long, a full disk: a user may read this
        sys.exit(str(failure))
