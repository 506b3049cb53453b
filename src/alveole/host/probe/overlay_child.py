"""Mount what a container's root filesystem is made of: an overlay whose lower layer is id-mapped.

Run as a program of its own, in a mount namespace of its own, so that nothing is left of it however it ends.
Its argument is an empty directory on the filesystem in question. Prints JSON: ``{}`` or ``{"error": ...}``.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from alveole.host import syscalls

CLONE_NEWUSER = 0x10000000
SHIFTED_ID = 1 << 28


def main(place: Path) -> None:
    try:
        _try_overlay(place)
    except OSError as error:
        json.dump({"error": f"{error.filename}: {error.strerror}"}, sys.stdout)
    else:
        json.dump({}, sys.stdout)


def _try_overlay(place: Path) -> None:
    layer, lower, upper, work, merged = (place / name for name in ("layer", "lower", "upper", "work", "merged"))
    for directory in (layer / "directory", lower, upper, work, merged):
        directory.mkdir(parents=True)
    (layer / "file").write_text("")
    _mount_id_mapped(layer, lower)
    options = f"lowerdir={lower},upperdir={upper},workdir={work},userxattr"
    syscalls.mount("overlay", merged, "overlay", 0, options)
    owner = (merged / "file").stat().st_uid
    if owner != SHIFTED_ID:
        raise OSError(0, f"a file shows owner {owner} instead of {SHIFTED_ID}", "id-mapped lower layer")
    (merged / "directory").rmdir()
    (merged / "directory").mkdir()  # marks it opaque, which needs user extended attributes
    os.getxattr(upper / "directory", "user.overlay.opaque")


def _mount_id_mapped(source: Path, target: Path) -> None:
    tree = syscalls.open_tree_clone(os.open(source, os.O_PATH), recursive=False)
    syscalls.mount_setattr(tree, syscalls.MOUNT_ATTR_IDMAP, user_namespace=_user_namespace(), recursive=False)
    syscalls.move_mount(tree, os.open(target, os.O_PATH))


def _user_namespace() -> int:
    """A file descriptor of a user namespace whose ids 0..65535 are the host's from SHIFTED_ID."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        refused = ctypes.CDLL(None).unshare(CLONE_NEWUSER)
        os.write(told, b"-" if refused else b"+")
        signal.pause()
    try:
        if os.read(ready, 1) != b"+":
            raise OSError(0, "refused by the kernel", "new user namespace")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text(f"0 {SHIFTED_ID} 65536")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
