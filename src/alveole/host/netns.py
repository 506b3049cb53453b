"""User and network namespaces made ahead and kept by bind mounts ("pins") of their /proc files.

A user namespace can only be made by a process that has a single thread, so a small child of the daemon makes them: it
forks once per request, the fork unshares, the child maps its ids and pins what was made. The child ends with the daemon
(its input closes). Started with ``-I -S``, it loads the standard library and two small modules of this package.
"""

import asyncio
import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from alveole.host import syscalls, sysctl
from alveole.host.netlink import Netlink

USER_PIN, NETWORK_PIN = "user", "net"
IDS_PER_RANGE = 65536

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MS_BIND = 4096
_PR_SET_PDEATHSIG = 1
_REQUEST_TIMEOUT_S = 10.0

# As other container engines have it: an image's unprivileged user may bind port 80 and ping, and eth0 has no IPv6,
# which nothing would route.
_SYSCTLS = (
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", f"0 {IDS_PER_RANGE - 1}"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
)

_WORD = struct.Struct("=i")
_SIOCGIFCONF = 0x8912
_ADDRESS_ENTRY = struct.Struct("16s4x4s16x")  # struct ifreq with a sockaddr_in
_MOST_ADDRESSES = 1024
_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceMaker:
    """The daemon's end of the child. One request at a time."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def make(self, directory: Path, *, ids_base: int | None, network: bool) -> None:
        """Pin new namespaces in ``directory``: a user namespace if ``ids_base`` is given, and a network namespace.

        Raises OSError with the child's words; then nothing is pinned.
        """
        request = {"directory": str(directory), "ids_base": ids_base, "network": network}
        async with self._turn:
            answer = await self._ask(json.dumps(request).encode() + b"\n")
        if answer["error"]:
            raise OSError(f"making namespaces in {directory}: {answer['error']}")

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()

    async def _ask(self, request: bytes) -> dict[str, Any]:
        """Ask the child. Whatever goes wrong, cancellation too, ends it: the next request gets a fresh one."""
        if self._process is None:
            self._process = await _spawn()
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # noqa: S101, PT018  (both are pipes)
        try:
            stdin.write(request)
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                line = await stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"error": "the namespace helper ended"}
        except BaseException:
            await self.close()
            raise
        if not line:
            await self.close()
        return answer


async def _spawn() -> asyncio.subprocess.Process:
    source = str(Path(__file__).parent.parent.parent)
    code = f"import sys; sys.path.insert(0, {source!r}); from alveole.host.netns import serve; serve({os.getpid()})"
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-ISc",
        code,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={"LC_ALL": "C.UTF-8"},
        process_group=0,
    )


def serve(daemon_pid: int) -> None:
    """The child: one JSON request a line, one JSON answer a line, until its input ends.

    Killed with the daemon: what it made later, the next daemon would not find when it looks for leftovers.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its pipe breaks a moment before that signal comes: end quietly
    if os.getppid() != daemon_pid:  # it died before it could be asked for that
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            _make(Path(request["directory"]), request["ids_base"], network=request["network"])
            answer = ""
        except OSError as error:
            answer = str(error)
        print(json.dumps({"error": answer}), flush=True)


def _make(directory: Path, ids_base: int | None, *, network: bool) -> None:
    remove_pins(directory)
    directory.mkdir()
    try:
        with _forked() as (pid, unshare):
            if ids_base is not None:
                unshare(_CLONE_NEWUSER)
                for name in ("uid_map", "gid_map"):
                    Path(f"/proc/{pid}/{name}").write_text(f"0 {ids_base} {IDS_PER_RANGE}\n")
                _pin(pid, directory, USER_PIN)
            if network:
                unshare(_CLONE_NEWNET)  # after the user namespace, which so becomes its owner
                _pin(pid, directory, NETWORK_PIN)
    except BaseException:
        remove_pins(directory)
        raise


@contextmanager
def _forked() -> Iterator[tuple[int, Callable[[int], None]]]:
    """A process, and the function that makes it enter new namespaces. It ends with the context."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _obey(theirs)

    def unshare(flag: int) -> None:
        ours.sendall(_WORD.pack(flag))
        answer = ours.recv(_WORD.size)
        number = _WORD.unpack(answer)[0] if answer else errno.ESRCH
        if number:
            raise OSError(number, f"unshare: {os.strerror(number)}")

    theirs.close()
    try:
        yield pid, unshare
    finally:
        ours.close()
        os.waitpid(pid, 0)


def _obey(channel: socket.socket) -> NoReturn:
    """The fork: unshare what each word says and answer the errno, until the parent hangs up."""
    try:
        while word := channel.recv(_WORD.size):
            flag = _WORD.unpack(word)[0]
            number = ctypes.get_errno() if _libc.unshare(flag) else 0
            if flag == _CLONE_NEWNET and not number:
                _set_defaults()
            channel.sendall(_WORD.pack(number))
    finally:
        os._exit(0)


def _set_defaults() -> None:
    for name, value in _SYSCTLS:
        sysctl.write_if_present(name, value)


def _pin(pid: int, directory: Path, name: str) -> None:
    (directory / name).touch()
    syscalls.mount(f"/proc/{pid}/ns/{name}", directory / name, "", _MS_BIND, "")


def is_pinned(path: Path) -> bool:
    """Whether this is a pinned namespace, not a file left where one was."""
    return path.is_file() and path.parent.is_dir() and path.stat().st_dev != path.parent.stat().st_dev


def remove_pins(directory: Path) -> None:
    """Give up the namespaces pinned in ``directory``, and the directory. Fine if there are none, or half of it."""
    for pin in (directory / USER_PIN, directory / NETWORK_PIN):
        while is_pinned(pin):
            syscalls.umount(pin, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        pin.unlink(missing_ok=True)
    if directory.is_dir():
        directory.rmdir()


@contextmanager
def entered(pin: Path) -> Iterator[None]:
    """The calling thread, and no other, in the network namespace pinned at ``pin``. Blocks."""
    with Path("/proc/thread-self/ns/net").open("rb") as home, pin.open("rb") as inside:
        _enter(inside.fileno())
        try:
            yield
        finally:
            _enter(home.fileno())


@contextmanager
def netlink_inside(pin: Path) -> Iterator[Netlink]:
    """A netlink socket of the network namespace pinned at ``pin``: made there, used from here. Blocks."""
    with entered(pin):
        connection = Netlink()
    with connection:
        yield connection


def addresses_inside(pin: Path) -> list[tuple[str, str]]:
    """(device, IPv4 address) of the network namespace pinned at ``pin``, without those of the loopback. Blocks."""
    with entered(pin):
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    answer = ctypes.create_string_buffer(_ADDRESS_ENTRY.size * _MOST_ADDRESSES)
    with asking:
        question = struct.pack("iP", len(answer), ctypes.addressof(answer))
        used = struct.unpack("iP", fcntl.ioctl(asking, _SIOCGIFCONF, question))[0]
    entries = _ADDRESS_ENTRY.iter_unpack(answer.raw[:used])
    named = ((name.partition(b"\0")[0].decode(), socket.inet_ntoa(address)) for name, address in entries)
    return [(name, address) for name, address in named if name != "lo"]


def _enter(descriptor: int) -> None:
    """Move the calling thread, and no other, to a network namespace."""
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
