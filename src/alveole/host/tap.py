"""Tap devices that stay when nobody has them open, for a program that may open one but not make any.

Only the standard library is used. Everything here is about the network namespace of the calling thread.
"""

import ctypes
import fcntl
import os
import socket
import struct

_CLONE = "/dev/net/tun"
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_TAP, _NO_PI, _VNET_HDR = 0x0002, 0x1000, 0x4000
_REQUEST = struct.Struct("=16sH22x")


def ensure_tap(name: str, owner: int) -> None:
    """A persistent tap device that the host's user ``owner`` (and root) may open. One that is there stays as it is."""
    if name in {present for _, present in socket.if_nameindex()}:
        return
    descriptor = open_tap(name)
    try:
        fcntl.ioctl(descriptor, _TUNSETOWNER, ctypes.c_int(owner).value)  # Python takes no unsigned int
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)  # last: until then it vanishes with us
    finally:
        os.close(descriptor)


def open_tap(name: str, *, headers: bool = True) -> int:
    """The other end of a tap, as a descriptor of frames; with ``headers`` each after 10 bytes that describe offloads.

    Raises OSError: EPERM if it belongs to another user, EBUSY if somebody has it open.
    """
    descriptor = os.open(_CLONE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, _REQUEST.pack(name.encode(), _TAP | _NO_PI | (_VNET_HDR if headers else 0)))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
