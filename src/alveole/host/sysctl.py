"""Kernel settings under /proc/sys, of the network namespace of the calling thread."""

from pathlib import Path

_ROOT = Path("/proc/sys")


def read(name: str) -> str:
    """The value of ``net/ipv4/ip_forward`` and the like."""
    return (_ROOT / name).read_text().strip()


def write(name: str, value: str) -> None:
    (_ROOT / name).write_text(value)


def write_if_present(name: str, value: str) -> None:
    """For settings that a kernel without the feature (IPv6) does not have."""
    if (_ROOT / name).exists():
        write(name, value)
