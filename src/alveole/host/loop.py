"""Loop devices: a file as a block device. Each lives exactly as long as what is mounted from it.

Buffered, never direct I/O, which corrupts data over some filesystems.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from alveole.host import syscalls
from alveole.host.blocking import in_thread
from alveole.host.mount import mounting
from alveole.host.mountinfo import mounts
from alveole.model.error import internal, unsupported

_LOOP_SET_CAPACITY = 0x4C07
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_AUTOCLEAR = 4
_INFO = "=5Q4I64s64s32s2Q"  # struct loop_info64
_CONFIGURE = f"=II{_INFO[1:]}8Q"  # struct loop_config: file, block size, loop_info64, reserved
_BLOCK_BYTES = 512
_FLOCK = "hhqqi0q"  # struct flock: type, whence, start, length (0: to the end), process


async def mount_image(image: Path, target: Path, filesystem: str, *, options: str) -> None:
    """Mount the filesystem in ``image`` at ``target`` (made where missing), nosuid and nodev.

    If the image is still mounted elsewhere (a process holds it), that same device is used: an image never has two.
    Raises UNSUPPORTED without loop devices, INTERNAL if the kernel does not accept the filesystem.
    """
    await mounting(target, partial(_mount_image, image, target, filesystem, options))


async def is_attached(image: Path) -> bool:
    """Whether something mounted from ``image`` is still in use, here or in another mount namespace."""
    return await in_thread(lambda: _device_of(image) is not None)


async def is_locked(image: Path) -> bool:
    """Whether a process holds locks on the file, as QEMU does on a disk as long as a machine has it."""
    return await in_thread(partial(_is_locked, image))


async def grow_device(target: Path) -> None:
    """Let the device mounted at ``target`` see that its image has grown."""

    def grow() -> None:
        source = next(entry.source for entry in reversed(mounts()) if entry.target == str(target))
        with _opened(Path(source), os.O_RDWR) as device:
            fcntl.ioctl(device, _LOOP_SET_CAPACITY)

    await in_thread(grow)


def _mount_image(image: Path, target: Path, filesystem: str, options: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with _attached(image) as device:  # the device ends when closed, unless mounted by then
        try:
            flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOATIME
            syscalls.mount(device, target, filesystem, flags, options)
        except OSError as error:
            raise internal(
                f"the {filesystem} filesystem in {image} cannot be mounted: {error.strerror}",
                hint="the kernel log says what is wrong with it",
            ) from error


@contextmanager
def _attached(image: Path) -> Iterator[Path]:
    device = _device_of(image)
    if device:
        with _opened(device, os.O_RDWR):
            if _device_of(image) == device:  # held open now, it cannot end any more
                yield device
                return
    with _opened(image, os.O_RDWR) as file:
        while True:
            free = _free_device()
            with _opened(free, os.O_RDWR) as descriptor:
                if _configure(descriptor, file, image):
                    yield free
                    return


def _free_device() -> Path:
    try:
        with _opened(Path("/dev/loop-control"), os.O_RDWR) as control:
            return Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
    except OSError as error:
        raise unsupported(f"this host has no usable loop devices: {error.strerror}", hint="modprobe loop") from error


def _configure(device: int, file: int, image: Path) -> bool:
    """Bind the file to the device in one step; False if somebody else took that device."""
    name = os.fsencode(image)[-63:]
    info = (0, 0, 0, 0, 0, 0, 0, 0, _LO_FLAGS_AUTOCLEAR, name, b"", b"", 0, 0)
    try:
        fcntl.ioctl(device, _LOOP_CONFIGURE, struct.pack(_CONFIGURE, file, _BLOCK_BYTES, *info, *[0] * 8))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


def _device_of(image: Path) -> Path | None:
    """The loop device that ``image`` is bound to, by inode: names mean something else in other mount namespaces."""
    try:
        wanted = image.stat()
    except FileNotFoundError:
        return None
    for bound in Path("/sys/block").glob("loop*/loop"):
        device = Path("/dev", bound.parent.name)
        if _backing_of(device) == (wanted.st_dev, wanted.st_ino):
            return device
    return None


def _backing_of(device: Path) -> tuple[int, int] | None:
    """Filesystem and inode of the device's file; None if it has none (any more)."""
    info = bytearray(struct.calcsize(_INFO))
    try:
        with _opened(device, os.O_RDONLY) as descriptor:
            fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, info)
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.ENOENT}:
            return None
        raise
    filesystem, inode = struct.unpack(_INFO, info)[:2]
    return filesystem, inode


def _is_locked(image: Path) -> bool:
    """Asked as if the whole file were to be locked for writing."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with _opened(image, os.O_RDWR) as file:
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
