"""The API's Unix socket: for root and one group."""

import grp
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alveole.model.error import invalid

MAX_SOCKET_PATH_BYTES = 107


@contextmanager
def listen(path: Path, group: str | None) -> Iterator[socket.socket]:
    """Listen at ``path``, which the caller alone may own. Raises INVALID for a path or group that cannot be used."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise invalid(f"socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes", hint="--socket names another")
    gid = _gid(group)
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    os.chown(path, 0, gid)
    path.chmod(0o660)
    listener.listen(1024)
    listener.setblocking(False)
    try:
        yield listener
    finally:
        listener.close()
        with suppress(FileNotFoundError):
            path.unlink()


def _gid(group: str | None) -> int:
    if group is None:
        return 0
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise invalid(f"group {group} does not exist", hint=f"addgroup --system {group}", field="group") from None
