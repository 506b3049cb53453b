"""The templates of this node, whichever runtimes they are of: shown, removed, made afresh."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from alveole.agent.engine import Engine
from alveole.model.error import internal, not_found
from alveole.model.template import Template
from alveole.runtime.base import Capability, Handle, Ids, TemplatePool, Templating, Workplace


async def shown(engine: Engine, running: Collection[Handle]) -> tuple[Template, ...]:
    """All of them, by key; how many of ``running`` share the memory of each."""
    found = [template for pool in _pools(engine) for template in await pool.shown(running)]
    return tuple(template.replace(node=engine.node.name) for template in sorted(found, key=lambda one: one.key))


async def remove(engine: Engine, key: str) -> Mapping[str, Any]:
    """Nothing happens if there is none: it may have been removed before a crash."""
    removed = [await pool.remove(key) for pool in _pools(engine)]
    return {"freed_bytes": sum(freed for freed, _ in removed), "held_bytes": sum(held for _, held in removed)}


async def refresh(engine: Engine, key: str, operation_id: str) -> Mapping[str, Any]:
    """Its machine gets an id range and namespaces as an instance without a network has them, for this operation alone:
    another may be making the same one afresh. Raises NOT_FOUND."""
    pool = await _pool_of(engine, key)
    name = f"template-{operation_id}"
    attachment = await engine.network.attach(
        instance_id=name,
        project="",
        name=name,
        hostname="",
        network=None,
        mode="none",
        address="",
        ports=(),
        ids=None,
        shifted=True,
        machine="constant",
    )
    try:
        if attachment.card is None:
            raise internal(f"the machine of template {key} was given no network card")
        workplace = Workplace(
            ids=Ids(base=attachment.ids_base),
            user_namespace=Path(attachment.user_namespace),
            cgroup=engine.identity.cgroup,
        )
        await pool.refresh(key, workplace, attachment.card)
    finally:
        await engine.network.detach(attachment, keep_ids=False)
    return {}


async def _pool_of(engine: Engine, key: str) -> TemplatePool:
    for pool in _pools(engine):
        if any(template.key == key for template in await pool.shown(())):
            return pool
    raise not_found(f"template {key} does not exist", hint="alveole template ls shows all")


def _pools(engine: Engine) -> list[TemplatePool]:
    """One runtime may serve several isolations."""
    runtimes = dict.fromkeys(engine.runtimes.values())
    return [cast("Templating", one).templates for one in runtimes if Capability.TEMPLATES in one.capabilities]
