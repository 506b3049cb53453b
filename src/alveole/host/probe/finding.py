"""One thing found out about the host, what it means for Alveole, and what to do about it."""

import os
from dataclasses import dataclass
from enum import StrEnum

INSTALL = "apt-get install --yes --no-install-recommends"


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"  # Alveole works, with something less
    MISSING = "missing"  # what this finding is about cannot be used


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    name: str
    status: Status
    needed: bool  # without it Alveole does not work
    found: str
    means: str  # for Alveole and its users
    fix: str = ""  # what to do, for people
    command: str = ""  # a shell command that does it and harms nothing else; empty: a decision for people


def needs_root(name: str, *, needed: bool) -> Finding | None:
    """The finding of a check that only root can make, when this process is not root."""
    if os.geteuid() == 0:
        return None
    return Finding(
        name=name,
        status=Status.WARN,
        needed=needed,
        found="not checked",
        means="this check needs root",
        fix="run as root: sudo alveole doctor",
    )
