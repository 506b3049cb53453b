"""Where state is kept: what its filesystem can do, and how much room it has."""

import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from alveole.host.probe.finding import Finding, Status, needs_root
from alveole.host.process import run
from alveole.model.error import AlveoleError

FICLONE = 0x40049409
TIMEOUT_S = 5.0
TRIAL_PREFIX = ".alveole-probe-"
WANTED_BYTES, NEEDED_BYTES = 10 << 30, 1 << 30
WANTED_FREE_INODES = 200_000


def nearest(state: Path) -> Path:
    """The state directory, or before it is made, the directory above that exists."""
    return next(path for path in (state, *state.parents) if path.is_dir())


async def overlay(state: Path) -> Finding:
    """Mount a container's kind of root filesystem on the state directory's filesystem, in a child's own namespace."""
    if skipped := needs_root("overlayfs", needed=True):
        return skipped
    try:
        _sweep(nearest(state))
        with tempfile.TemporaryDirectory(prefix=TRIAL_PREFIX, dir=nearest(state)) as place:
            child = ["unshare", "--mount", "--propagation", "private", sys.executable, "-I"]
            done = await run([*child, "-m", "alveole.host.probe.overlay_child", place], timeout_s=TIMEOUT_S)
        problem = json.loads(done.text).get("error", "")
    except (AlveoleError, OSError) as error:
        problem = str(error)
    if not problem:
        return Finding(
            name="overlayfs",
            status=Status.OK,
            needed=True,
            found=f"an overlay with an id-mapped layer works in {nearest(state)}",
            means="containers share their image's files, and each has user ids of its own",
        )
    return Finding(
        name="overlayfs",
        status=Status.MISSING,
        needed=True,
        found=problem[:200],
        means=f"containers cannot have root filesystems in {nearest(state)}",
        fix="use a kernel from 5.19 on with overlayfs and user namespaces (user.max_user_namespaces above 0), "
        "and keep the state on ext4, XFS or btrfs",
    )


def _sweep(directory: Path) -> None:
    """Remove what a probe killed midway left. A probe under way has a younger directory."""
    for left in directory.glob(f"{TRIAL_PREFIX}*"):
        if time.time() - left.stat().st_mtime > 10 * TIMEOUT_S:
            shutil.rmtree(left, ignore_errors=True)


def reflink(state: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=nearest(state)) as source, tempfile.TemporaryFile(dir=nearest(state)) as target:
            source.write(b"a" * 4096)
            source.flush()
            fcntl.ioctl(target, FICLONE, source.fileno())
        found, means = "yes", "volumes are copied and snapshotted instantly in the state directory itself"
    except PermissionError:
        found, means = "not checked", f"{nearest(state)} cannot be written without root"
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EXDEV}:
            raise
        found, means = "no", "Alveole keeps volumes in an XFS pool that it makes in a file there"
    return Finding(name="reflink", status=Status.OK, needed=False, found=f"{found} ({nearest(state)})", means=means)


def space(state: Path) -> Finding:
    there = os.statvfs(nearest(state))
    return judge_space(
        nearest(state),
        free_bytes=there.f_bavail * there.f_frsize,
        free_inodes=there.f_favail if there.f_files else None,
    )


def judge_space(place: Path, *, free_bytes: int, free_inodes: int | None) -> Finding:
    """``free_inodes`` None: the filesystem makes them as needed."""
    few_inodes = free_inodes is not None and free_inodes < WANTED_FREE_INODES
    inodes = "inodes as needed" if free_inodes is None else f"{free_inodes} inodes"
    status = Status.WARN if free_bytes < WANTED_BYTES or few_inodes else Status.OK
    if free_bytes < NEEDED_BYTES or free_inodes == 0:
        status = Status.MISSING
    return Finding(
        name="free space",
        status=status,
        needed=True,
        found=f"{free_bytes / (1 << 30):.1f} GiB and {inodes} in {place}",
        means="room for images, volumes and logs" if status is Status.OK else "images and volumes will soon not fit",
        fix="" if status is Status.OK else f"free some space, or give the daemon another --state than {place}",
    )
