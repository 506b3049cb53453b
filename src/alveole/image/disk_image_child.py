"""Converts a disk image: ``python -I -m alveole.image.disk_image_child SOURCE TARGET SIZE USER``.

SOURCE is a qcow2 image; TARGET, a file that is there, becomes a raw disk of SIZE bytes. To be run by root as the first
process of mount, process, network, IPC and UTS namespaces of its own: all that it mounts and starts ends with it.

qemu-img, which reads what may be hostile, runs as the user id USER without any privilege, and finds nothing but the
host's programs and the two files, the one read-only, of the host. It says on standard error what went wrong.
"""

import os
import signal
import sys
from pathlib import Path

from alveole.host import syscalls

EXIT_JAIL = 70  # nothing was started
EXIT_KILLED = 71

CPU_S = 1800
_MEMORY_BYTES = 2 << 30
_PROCESSES = 256  # of USER, and threads: qemu-img starts up to 64
_OPEN_FILES = 256
_PROGRAMS = tuple(map(Path, ("/usr", "/bin", "/lib", "/lib64")))  # links into /usr, if they are that on the host
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


def main(arguments: list[str]) -> int:
    source, target, size_bytes, user = arguments
    try:
        _enter(Path(source), Path(target))
        pid = os.posix_spawnp("prlimit", _command(int(size_bytes), int(user)), _ENVIRONMENT)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_JAIL
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        sys.stderr.write(f"{signal.Signals(-code).name}\n")
        return EXIT_KILLED
    return code


def _enter(source: Path, target: Path) -> None:
    """Make ``/`` a place that holds the programs and the two files."""
    plain = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
    read_only = plain | syscalls.MOUNT_ATTR_RDONLY
    trees = {
        "source": _tree(source, read_only),
        "target": _tree(target, plain),
        "dev/null": _tree(Path("/dev/null"), syscalls.MOUNT_ATTR_NOSUID),  # qemu-img tries its locks on it
        **{path.name: _tree(path, read_only) for path in _PROGRAMS if path.is_dir() and not path.is_symlink()},
    }
    place = target.parent  # covered only now: the files in it are open
    syscalls.mount("tmpfs", place, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755,size=64k")
    (place / "dev").mkdir()
    for path in filter(Path.is_symlink, _PROGRAMS):
        (place / path.name).symlink_to(path.readlink())
    for name, (tree, is_directory) in trees.items():
        (place / name).mkdir() if is_directory else (place / name).touch()
        there = os.open(place / name, os.O_PATH)
        syscalls.move_mount(tree, there)
        os.close(there)
        os.close(tree)
    os.chroot(place)
    os.chdir("/")


def _tree(path: Path, attributes: int) -> tuple[int, bool]:
    """A detached mount of a file or directory, and whether it is a directory."""
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    is_directory = path.is_dir()
    tree = syscalls.open_tree_clone(found, recursive=is_directory)
    os.close(found)
    syscalls.mount_setattr(tree, attributes, recursive=is_directory)
    return tree, is_directory


def _command(size_bytes: int, user: int) -> list[str]:
    limits = {
        "cpu": f"{CPU_S}:{CPU_S + 5}",  # the first limit's signal tells why it was killed
        "fsize": size_bytes,
        "as": _MEMORY_BYTES,
        "nproc": _PROCESSES,
        "nofile": _OPEN_FILES,
        "core": 0,
    }
    return [
        *("prlimit", *(f"--{name}={value}" for name, value in limits.items())),
        *("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"),
        *("--inh-caps=-all", "--bounding-set=-all"),
        *("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "/source", "/target"),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
