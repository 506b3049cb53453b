"""Run Python code that reads hostile data where it can reach one directory and nothing else of the host."""

import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

KEPT_CAPABILITIES = (0, 1, 3, 4, 31)  # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETFCAP

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_FIRST_FREE_DESCRIPTOR = 3

_libc = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """Be killed when ``parent``, which started this process, dies, also if it has died already."""
    _call(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def run_jailed(body: Callable[[], int], root: Path, limits: Mapping[int, int]) -> int:
    """Run ``body`` in a forked child that sees ``root`` as ``/``; return what ``os.waitstatus_to_exitcode`` says of it.

    The child is root of its own user namespace, whose ids 0..65535 are the host's, so that it owns what it writes as
    an image says, and holds KEPT_CAPABILITIES over files with such ids, none over the host. It has its own mount,
    network, IPC, UTS and process namespaces, standard input, output and error only, and ``limits``
    (``resource.RLIMIT_*``). It can import nothing, as modules would come from ``root``.

    To be called by root in a process without threads. Raises OSError if the namespaces cannot be made.
    """
    _call(_libc.unshare(_CLONE_NEWPID))  # the next child is the first of a new process namespace
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os._exit(_child(body, root, limits, theirs))
    theirs.close()
    with ours:
        if ours.recv(1):  # the child has made its namespaces
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{name}").write_text("0 0 65536")
            ours.send(b"1")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sync_filesystem() -> None:
    """Wait until everything written to the filesystem of ``/`` is on its disk."""
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        _call(_libc.syncfs(root))
    finally:
        os.close(root)


def _child(body: Callable[[], int], root: Path, limits: Mapping[int, int], parent: socket.socket) -> int:
    try:
        namespaces = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
        _call(_libc.unshare(namespaces))
        _call(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        parent.send(b"1")
        if not parent.recv(1):
            return 1
        os.chroot(root)
        os.chdir("/")
        _lock(limits)
        return body()
    except BaseException as error:  # the fork ends here, whatever happened
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        return 1


def _lock(limits: Mapping[int, int]) -> None:
    """Give up for good everything but KEPT_CAPABILITIES, the standard streams and what is already imported."""
    os.closerange(_FIRST_FREE_DESCRIPTOR, os.sysconf("SC_OPEN_MAX"))
    os.setgroups([])
    last_capability = 63
    for capability in set(range(last_capability + 1)) - set(KEPT_CAPABILITIES):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # EINVAL beyond the kernel's last one
    _set_capabilities(sum(1 << capability for capability in KEPT_CAPABILITIES))
    _call(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    sys.meta_path.clear()


def _set_capabilities(mask: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low = mask & 0xFFFFFFFF
    data = (ctypes.c_uint32 * 6)(low, low, 0, 0, 0, 0)  # effective, permitted, inheritable of ids 0-31, then 32-63
    _call(_libc.capset(header, data))


def _call(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
