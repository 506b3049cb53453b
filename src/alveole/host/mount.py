"""Mounts: overlays, binds and their removal.

Every mount made here is private, nodev, and complete at the moment it appears, so that a mount point that exists is
one that is ready: each function is idempotent by looking for it. Names are resolved once, then only descriptors count.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alveole.host import syscalls
from alveole.host.blocking import in_thread
from alveole.host.mountinfo import is_mountpoint, mount_id, mounts, targets_below
from alveole.model.error import AlveoleError, internal, invalid, unsupported

_OPTIONS_LIMIT_BYTES = 4095  # a page and its final zero
_SCRATCH_OPTIONS = "mode=0700,size=64k"  # empty directories take no pages


@dataclass(frozen=True, slots=True, kw_only=True)
class IdShift:
    """Ids 0..size-1 inside ``user_namespace`` (a pinned one, by path) are base..base+size-1 on the host."""

    base: int
    size: int
    user_namespace: Path


async def mount_overlay(
    target: Path, lowers: Sequence[Path], upper: Path, work: Path, *, shift: IdShift | None, scratch: Path
) -> None:
    """Mount ``lowers`` (lowest first, never written to) with the writable ``upper`` over them at ``target``.

    With ``shift`` the lowers, owned as in the image, are seen owned by shifted ids, and the upper holds shifted ids.
    ``target``, ``upper`` and ``work`` are made where missing; upper and work lie on one filesystem. ``scratch`` is a
    path of the caller's for the time of the call. Nothing happens if something is mounted at ``target``.

    Raises INVALID without layers or with more than the kernel's option page holds (about 200), UNSUPPORTED if a
    layer's filesystem cannot be id-mapped or the upper's cannot hold an overlay.
    """
    await mounting(target, partial(_mount_overlay, target, lowers, upper, work, shift=shift, scratch=scratch))


async def bind(source: Path, target: Path, *, read_only: bool, recursive: bool) -> None:
    """Show the file or directory ``source`` at ``target`` (made where missing), nosuid and nodev."""
    await mounting(target, partial(_bind, source, target, None, read_only=read_only, recursive=recursive))


async def bind_idmapped(source: Path, target: Path, user_namespace: Path, *, read_only: bool, recursive: bool) -> None:
    """Like ``bind``, with owners seen through ``user_namespace``: id 0 on disk is id 0 inside, both ways.

    Raises UNSUPPORTED naming the filesystem if it cannot be id-mapped.
    """
    await mounting(target, partial(_bind, source, target, user_namespace, read_only=read_only, recursive=recursive))


async def ensure_private(directory: Path) -> None:
    """Bind ``directory`` on itself, privately: mounts made below it later do not spread to other mount namespaces."""
    await in_thread(partial(_ensure_propagation, directory, syscalls.MS_PRIVATE))


async def ensure_shared(directory: Path) -> None:
    """Bind ``directory`` on itself, shared: what is unmounted below it ends in mount namespaces copied from ours too.

    That is what a disk needs: a copy nobody knows of, in a service of the host, would keep its filesystem alive.
    """
    await in_thread(partial(_ensure_propagation, directory, syscalls.MS_SHARED))


async def mount_tmpfs(target: Path, *, size_bytes: int, mode: int) -> None:
    """A file system in memory that holds no more than that. Nothing happens if something is mounted there."""
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    options = f"size={size_bytes},mode={mode:o}"
    await mounting(target, partial(syscalls.mount, "tmpfs", target, "tmpfs", flags, options))


async def unmount(target: Path) -> None:
    """Unmount all that is mounted at ``target``; if it is in use, it vanishes now and ends with its last user.

    Nothing happens if nothing is mounted there.
    """
    await in_thread(partial(_unmount, target))


async def unmount_below(directory: Path) -> None:
    """Unmount everything at and below ``directory``, whoever mounted it: for recovery."""
    await in_thread(partial(_unmount_below, directory))


async def mounting(target: Path, call: Callable[[], None]) -> None:
    """Run ``call``, which mounts something at ``target`` as its last step; undone on failure and cancel.

    Nothing happens if something is mounted there.
    """
    if is_mountpoint(target):
        return
    try:
        await in_thread(call)
    except BaseException:
        await unmount(target)
        raise


def _mount_overlay(
    target: Path, lowers: Sequence[Path], upper: Path, work: Path, *, shift: IdShift | None, scratch: Path
) -> None:
    if not lowers:
        raise invalid("image has no layers: there is nothing to run in it")
    target.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    _ensure_upper(upper, lowers[-1], shift)
    with _layers_at(scratch, lowers, shift.user_namespace if shift else None) as names:
        options = f"userxattr,upperdir={_escape(upper)},workdir={_escape(work)},lowerdir={':'.join(names)}"
        if len(os.fsencode(options)) > _OPTIONS_LIMIT_BYTES:
            fitting = (_OPTIONS_LIMIT_BYTES - len(os.fsencode(options)) + len(":".join(names))) // (len(names[-1]) + 1)
            raise invalid(f"image has {len(names)} layers, at most {fitting} can be mounted", hint="squash its layers")
        try:
            syscalls.mount("overlay", target, "overlay", syscalls.MS_NODEV, options)
        except OSError as error:
            raise _overlay_refused(error, upper) from error
    syscalls.set_propagation(target, syscalls.MS_PRIVATE)


def _ensure_upper(upper: Path, top: Path, shift: IdShift | None) -> None:
    """The root directory of an overlay is its upper's: give it owner and mode of the image's. Once: it may change."""
    if upper.exists():
        return
    like = top.stat()
    if shift and max(like.st_uid, like.st_gid) >= shift.size:
        raise invalid(f"image root belongs to {like.st_uid}:{like.st_gid}, beyond the {shift.size} ids of an instance")
    base = shift.base if shift else 0
    new = upper.with_name(f"{upper.name}.new")
    new.mkdir(parents=True, exist_ok=True)
    os.chown(new, like.st_uid + base, like.st_gid + base)
    new.chmod(stat.S_IMODE(like.st_mode))
    new.rename(upper)


@contextmanager
def _layers_at(scratch: Path, lowers: Sequence[Path], user_namespace: Path | None) -> Iterator[list[str]]:
    """Private copies of the layers under names as short as can be, topmost first as overlayfs wants them.

    They hang below one mount, so that one unmount (each waits for the whole kernel) removes them all. The overlay
    keeps copies of its own.
    """
    _unmount(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    syscalls.mount("tmpfs", scratch, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, _SCRATCH_OPTIONS)
    try:
        syscalls.set_propagation(scratch, syscalls.MS_PRIVATE)
        with _opened(scratch) as root:
            # overlayfs refuses a layer given twice (empty ones often are); the upper one hides all of the lower one
            distinct = tuple(dict.fromkeys(reversed(lowers)))
            names = [f"/proc/self/fd/{root}/{number}" for number in range(len(distinct))]
            for lower, name in zip(distinct, names, strict=True):
                Path(name).mkdir()
                _attach(lower, Path(name), user_namespace, syscalls.MOUNT_ATTR_RDONLY, recursive=False)
            yield names
    finally:
        _unmount(scratch, syscalls.MNT_DETACH)
        scratch.rmdir()


def _escape(path: Path) -> str:
    """As overlayfs splits its options."""
    return str(path).replace("\\", "\\\\").replace(",", "\\,")


def _overlay_refused(error: OSError, upper: Path) -> AlveoleError:
    if error.errno == errno.EINVAL:
        return unsupported(
            f"the filesystem of {upper} cannot hold the upper layer of an overlay",
            hint="put the state directory on ext4, XFS or btrfs; the kernel log says what overlayfs refused",
        )
    return internal(f"overlay mount failed: {error.strerror}", hint="the kernel log says what overlayfs refused")


def _bind(source: Path, target: Path, user_namespace: Path | None, *, read_only: bool, recursive: bool) -> None:
    attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
    attributes |= syscalls.MOUNT_ATTR_RDONLY if read_only else 0
    _attach(source, target, user_namespace, attributes, recursive=recursive)


def _attach(source: Path, target: Path, user_namespace: Path | None, attributes: int, *, recursive: bool) -> None:
    """Make a copy of the mount at ``source``, give it its attributes, then let it appear at ``target``."""
    with _opened(source) as origin:
        tree = syscalls.open_tree_clone(origin, recursive=recursive)
        try:
            if user_namespace is None:
                syscalls.mount_setattr(tree, attributes, recursive=recursive)
            else:
                with _fault_named(source, mount_id(origin)):
                    _map_ids(tree, attributes, user_namespace, recursive=recursive)
            _ensure_same_kind(target, origin)
            with _opened(target, os.O_NOFOLLOW) as place:
                syscalls.move_mount(tree, place)
        finally:
            os.close(tree)


def _map_ids(tree: int, attributes: int, user_namespace: Path, *, recursive: bool) -> None:
    namespace = os.open(user_namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        attributes |= syscalls.MOUNT_ATTR_IDMAP
        syscalls.mount_setattr(tree, attributes, user_namespace=namespace, recursive=recursive)
    finally:
        os.close(namespace)


@contextmanager
def _fault_named(source: Path, origin_mount: int) -> Iterator[None]:
    """The kernel says only EINVAL or EPERM where a filesystem does not let its ids be mapped."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EPERM}:
            raise
        filesystem = next((m.filesystem for m in mounts() if m.id == origin_mount), "unknown")
        raise unsupported(
            f"{source} cannot have its ids shifted: its filesystem ({filesystem}) or one below cannot",
            hint="use a volume, or a directory on ext4, XFS, btrfs or tmpfs",
        ) from error


def _ensure_same_kind(target: Path, origin: int) -> None:
    """A directory is mounted on a directory, anything else on a file."""
    if stat.S_ISDIR(os.fstat(origin).st_mode):
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _ensure_propagation(directory: Path, propagation: int) -> None:
    if not is_mountpoint(directory):
        _attach(directory, directory, None, 0, recursive=True)
    syscalls.set_propagation(directory, propagation)


def _unmount_below(directory: Path) -> None:
    for target in targets_below(directory):
        _unmount(target)


def _unmount(target: Path, flags: int = 0) -> None:
    while is_mountpoint(target):
        try:
            syscalls.umount(target, flags | syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.EBUSY and not flags:
                flags = syscalls.MNT_DETACH
            elif is_mountpoint(target):  # else somebody else unmounted it meanwhile
                raise
