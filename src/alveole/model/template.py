"""A template: what machines of one shape go on from, in place of booting."""

from typing import Literal

from alveole.model.base import Record, Timestamp

Cause = Literal["wanted", "damaged", "refreshed"]
"""Why it was made: a machine wanted it first, its files were no longer what had been written, or somebody asked."""


class Template(Record):
    """One of a node's. The node keeps it: it is no record of the store, and belongs to no project."""

    kind: Literal["template"] = "template"
    key: str  # 16 hex digits that stand for its shape and for the versions it was made with
    node: str = ""
    memory_bytes: int
    cpus: int
    tty: bool  # its machines have a terminal
    accelerator: str
    kernel: str
    qemu: str
    size_bytes: int  # of the node's disk
    created_at: Timestamp
    used_at: Timestamp  # when an instance last went on from it
    boot_s: float  # how long its machine took to boot
    cause: Cause
    checked: bool  # its files have been compared with what was written, since the daemon started
    instances: int  # that run and share its memory: they went on from it, or from an instance that did
