"""Which Linux capabilities an instance's process gets."""

import difflib
from collections.abc import Iterable

from alveole.model.error import invalid

DEFAULT = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""What Docker gives: images are written for it."""

KNOWN = (
    *DEFAULT,
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_DAC_READ_SEARCH",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_NET_ADMIN",
    "CAP_NET_BROADCAST",
    "CAP_PERFMON",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
)
_ALL = "ALL"


def capabilities(add: Iterable[str], drop: Iterable[str]) -> tuple[str, ...]:
    """The default set with ``drop`` taken away and ``add`` put in, sorted. "ALL" stands for every capability.

    A single name wins over "ALL": ``drop ALL, add CHOWN`` gives CHOWN; ``add ALL, drop MKNOD`` all but MKNOD.
    Names may be written with or without CAP_, in any case. Raises AlveoleError(INVALID) for an unknown one.
    """
    added, dropped = {_canonical(name) for name in add}, {_canonical(name) for name in drop}
    kept = set(DEFAULT)
    if _ALL in added:
        kept = set(KNOWN)
    elif _ALL in dropped:
        kept = set()
    return tuple(sorted((kept | (added - {_ALL})) - (dropped - {_ALL} - added)))


def _canonical(name: str) -> str:
    upper = name.upper()
    if upper == _ALL:
        return upper
    full = upper if upper.startswith("CAP_") else f"CAP_{upper}"
    if full in KNOWN:
        return full
    nearest = difflib.get_close_matches(full, KNOWN, n=1, cutoff=0.0)[0]
    raise invalid(f"there is no capability {name!r}", hint=f"the nearest is {nearest.removeprefix('CAP_')}")
