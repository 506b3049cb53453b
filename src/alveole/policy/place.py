"""On which node an instance runs. Pure."""

from collections.abc import Collection
from dataclasses import dataclass

from alveole.model.instance import InstanceSpec
from alveole.model.node import Node


@dataclass(frozen=True, slots=True)
class NoFit:
    """Why no node can take it: a reason for each."""

    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "; ".join(f"{node}: {reason}" for node, reason in self.reasons) or "no node is registered"


def place(spec: InstanceSpec, nodes: Collection[Node]) -> str | NoFit:
    """The name of the first node (by name) that can run it."""
    reasons = []
    for node in sorted(nodes, key=lambda n: n.name):
        reason = _misfit(spec, node)
        if not reason:
            return node.name
        reasons.append((node.name, reason))
    return NoFit(tuple(reasons))


def _misfit(spec: InstanceSpec, node: Node) -> str:
    if spec.isolation not in node.isolations:
        return f"cannot run isolation {spec.isolation}: {node.lacking.get(spec.isolation, 'not available')}"
    memory = spec.resources.memory_bytes
    if memory is not None and memory > node.memory_bytes:
        return f"memory limit of {memory >> 20} MiB exceeds the node's {node.memory_bytes >> 20} MiB"
    if spec.resources.cpus is not None and spec.resources.cpus > node.cpus:
        return f"{spec.resources.cpus:g} CPUs exceed the node's {node.cpus}"
    return ""
