"""Fills a root disk: ``python -I -m alveole.image.root_disk_child PARENT DISK SIZE [LAYER ...]``, layers lowest first.

To be run in a mount namespace of its own: what it mounts ends with it, however it ends. It prints one line of JSON,
a ``Survey`` of what the layers hold together, and then becomes mke2fs, which copies that into an ext4 filesystem in
the file DISK; not if the survey says that it does not fit.
"""

import json
import os
import shutil
import stat
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from alveole.host import syscalls
from alveole.host.jail import die_with

LABEL = "root"
_BLOCK_BYTES = 4096
_INODE_BYTES = 256
_BYTES_PER_INODE = 16384  # of the disk: mke2fs's own default
_SPARE_INODES = 8192

# A sparse file reads as zeros, so nothing needs to be zeroed, neither now nor later by the guest.
_EXTENDED = "assume_storage_prezeroed=1,lazy_itable_init=1,lazy_journal_init=1,nodiscard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    mode: int = 0o755  # of the root directory, which mke2fs does not copy, nor its owner
    uid: int = 0
    gid: int = 0
    inodes: int = 0
    content_bytes: int = 0  # what it takes where the layers are
    lost_and_found: bool = False  # whether the layers have one of their own
    fits: bool = True


def main(arguments: list[str]) -> None:
    parent, target, size_bytes, *layers = arguments
    die_with(int(parent))
    disk = os.open(target, os.O_RDWR)  # these stay open and are reached by number: a mount covers their names below
    lowers = [os.open(layer, os.O_PATH | os.O_DIRECTORY) for layer in dict.fromkeys(reversed(layers))]
    os.set_inheritable(disk, True)
    place = Path(target).parent
    syscalls.mount("tmpfs", place, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0700")
    os.chdir(place)
    for number, lower in enumerate(lowers):
        Path(str(number)).symlink_to(f"/proc/self/fd/{lower}")
    root, found = _merged(len(lowers))
    survey = _judged(found, int(size_bytes))
    print(json.dumps(asdict(survey)), flush=True)
    if survey.fits:
        os.execvp("mke2fs", _mke2fs(survey, root, f"/proc/self/fd/{disk}", int(size_bytes)))  # noqa: S606


def _judged(found: Survey, size_bytes: int) -> Survey:
    needed = found.content_bytes + found.inodes * _INODE_BYTES
    return Survey(**{**asdict(found), "fits": needed <= size_bytes})


def _mke2fs(survey: Survey, root: Path, disk: str, size_bytes: int) -> list[str]:
    inodes = max(size_bytes // _BYTES_PER_INODE, survey.inodes + survey.inodes // 4 + _SPARE_INODES)
    extended = f"{_EXTENDED},root_owner={survey.uid}:{survey.gid}"
    options = ["-L", LABEL, "-m", "0", "-b", str(_BLOCK_BYTES), "-N", str(inodes), "-E", extended]
    return ["mke2fs", "-q", "-F", "-t", "ext4", *options, "-d", str(root), disk]


def _merged(layers: int) -> tuple[Path, Survey]:
    """What ``layers`` (named 0, 1 ... in the working directory, topmost first) hold together, at a path below it.

    In a directory that only one layer has, the kernel lists whiteouts that it then does not find. An empty directory
    of the same name above makes it a merged one, in which they are not listed.
    """
    root, cover = Path("root"), Path("cover")
    for directory in (root, cover):
        directory.mkdir()
    if not layers:
        return root, Survey()
    top = Path("0").stat()
    os.chown(cover, top.st_uid, top.st_gid)
    cover.chmod(stat.S_IMODE(top.st_mode))  # no attributes: one of the layer's may say that it hides those below
    _mount(root, cover, layers)
    survey, haunted = _survey(root)
    if haunted:
        plain, root, cover = root, Path("covered"), Path("covers")
        root.mkdir()
        _copy_directories(plain, cover, haunted)
        _mount(root, cover, layers)
    return root, survey


def _mount(target: Path, cover: Path, layers: int) -> None:
    lowers = ":".join((str(cover), *map(str, range(layers))))
    flags = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("overlay", target, "overlay", flags, f"userxattr,lowerdir={lowers}")


def _survey(root: Path) -> tuple[Survey, set[str]]:
    """What is there, and the directories, relative to ``root``, that list what cannot be found."""
    haunted, seen, content_bytes, inodes = set[str](), set[tuple[int, int]](), 0, 0
    waiting = ["."]
    while waiting:
        directory = waiting.pop()
        for entry in os.scandir(root / directory):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                haunted.add(directory)
                continue
            if stat.S_ISDIR(status.st_mode):
                waiting.append(os.path.join(directory, entry.name))  # noqa: PTH118  (a hundred thousand of them)
            elif status.st_nlink > 1:
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            inodes += 1
            content_bytes += _BLOCK_BYTES if stat.S_ISDIR(status.st_mode) else status.st_blocks * 512
    top = root.stat()
    survey = Survey(
        mode=stat.S_IMODE(top.st_mode),
        uid=top.st_uid,
        gid=top.st_gid,
        inodes=inodes,
        content_bytes=content_bytes,
        lost_and_found=(root / "lost+found").exists(),
    )
    return survey, haunted


def _copy_directories(source: Path, target: Path, names: set[str]) -> None:
    """The directories ``names`` and those above them, empty, owned and described as they are."""
    wanted = {Path()}.union(*({Path(name), *Path(name).parents} for name in names))
    for name in sorted(wanted):
        (target / name).mkdir()
    for name in sorted(wanted, reverse=True):  # what is made in a directory changes its times
        status = (source / name).stat()
        os.chown(target / name, status.st_uid, status.st_gid)
        shutil.copystat(source / name, target / name)


if __name__ == "__main__":
    main(sys.argv[1:])
