"""Templates: removed and made afresh by the node that has them, as tasks. The node tells which it has."""

from collections.abc import Collection

from alveole.control import keys
from alveole.control.commit import Context, Idempotency, Plan, commit_operation, new_operation, put
from alveole.model.operation import Operation
from alveole.model.template import Template
from alveole.policy.template import find_template

REMOVE_DEADLINE_S = 300.0
REFRESH_DEADLINE_S = 900.0


async def remove(
    context: Context, project: str, known: Collection[Template], key: str, idempotency: Idempotency | None = None
) -> Operation:
    """``key`` may be the beginning of that of one in ``known``. Instances that go on from it keep what they have of it.

    Raises NOT_FOUND, or CONFLICT if it is the beginning of several.
    """
    plan = lambda: _plan(context, project, "template.rm", find_template(known, key), REMOVE_DEADLINE_S)  # noqa: E731
    return await commit_operation(context, project, idempotency, plan)


async def refresh(
    context: Context, project: str, known: Collection[Template], key: str, idempotency: Idempotency | None = None
) -> Operation:
    """As ``remove``. The old one serves until the new one is made."""
    context.space.require()
    plan = lambda: _plan(context, project, "template.refresh", find_template(known, key), REFRESH_DEADLINE_S)  # noqa: E731
    return await commit_operation(context, project, idempotency, plan)


def _plan(context: Context, project: str, verb: str, template: Template, deadline_s: float) -> Plan[Operation]:
    operation = new_operation(
        context,
        project,
        verb,
        f"template/{template.key}",
        node=template.node,
        params={"key": template.key},
        deadline_s=deadline_s,
    )
    return Plan(operation, (), (put(keys.operation(project, operation.id), operation),))
