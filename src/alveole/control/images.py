"""Images: names in a project for content that an agent fetches, builds or imports, as tasks."""

from typing import Any

from alveole.control import keys
from alveole.control.cache import Entry
from alveole.control.commit import (
    Context,
    Idempotency,
    Plan,
    absent,
    commit_operation,
    new_operation,
    put,
    unchanged,
)
from alveole.control.query import task_node
from alveole.model.error import conflict, invalid, not_found
from alveole.model.image import Image, Recipe
from alveole.model.operation import Operation
from alveole.model.reference import familiar, normalise
from alveole.store.base import Delete

PULL_DEADLINE_S = 1800.0
BUILD_DEADLINE_S = 3600.0


def find_image(context: Context, project: str, name: str) -> Entry | None:
    return context.cache.get(keys.image(project, normalise(name)))


async def pull(
    context: Context, project: str, reference: str, *, tls_verify: bool, idempotency: Idempotency | None = None
) -> Operation:
    context.space.require()

    def plan() -> Plan[Operation]:
        params = {"reference": normalise(reference), "tls_verify": tls_verify}
        return _plan_fetch(context, project, reference, "image.pull", params=params, deadline_s=PULL_DEADLINE_S)

    return await commit_operation(context, project, idempotency, plan)


async def load(
    context: Context,
    project: str,
    name: str,
    *,
    path: str,
    image_format: str,
    idempotency: Idempotency | None = None,
) -> Operation:
    """Import from a file or directory of the host."""

    context.space.require()

    def plan() -> Plan[Operation]:
        params = {"path": path, "format": image_format}
        return _plan_fetch(context, project, name, "image.import", params=params, deadline_s=PULL_DEADLINE_S)

    return await commit_operation(context, project, idempotency, plan)


async def build(
    context: Context,
    project: str,
    name: str,
    *,
    recipe: Recipe,
    directory: str,
    use_cache: bool,
    idempotency: Idempotency | None = None,
) -> Operation:
    context.space.require()

    def plan() -> Plan[Operation]:
        params: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "directory": directory,
            "use_cache": use_cache,
        }
        if recipe.base != "scratch" and not recipe.base.startswith("debian:"):
            base = find_image(context, project, recipe.base)
            if base is None or base.record.content is None:
                raise not_found(f"base image {recipe.base} does not exist", hint=f"alveole image pull {recipe.base}")
            if base.record.content.disk is not None:
                raise invalid(
                    f"base image {recipe.base} is the disk of a whole operating system, which has no layers to add to",
                    hint="choose an image of layers as the base",
                    field="recipe.base",
                )
            params["base"] = base.record.content.model_dump(mode="json", exclude_none=True)
        return _plan_fetch(context, project, name, "image.build", params=params, deadline_s=BUILD_DEADLINE_S)

    return await commit_operation(context, project, idempotency, plan)


def _plan_fetch(
    context: Context, project: str, name: str, verb: str, *, params: dict[str, Any], deadline_s: float
) -> Plan[Operation]:
    """An operation that will give ``name`` its content. An image that exists keeps its content until then."""
    canonical = normalise(name)
    key = keys.image(project, canonical)
    operation = new_operation(
        context,
        project,
        verb,
        f"image/{familiar(canonical)}",
        node=task_node(context.cache),
        params=params,
        deadline_s=deadline_s,
        result={"name": familiar(canonical)},
    )
    operation_put = put(keys.operation(project, operation.id), operation)
    entry = context.cache.get(key)
    if entry is not None:
        return Plan(operation, (unchanged(entry),), (operation_put,))
    image = Image(
        project=project,
        name=canonical,
        phase="pulling",
        source=verb,
        created_at=operation.created_at,
        operation=operation.id,
    )
    return Plan(operation, (absent(key),), (put(key, image), operation_put))


def plan_ensure(context: Context, project: str, name: str, policy: str) -> Plan[dict[str, Any]]:
    """The image an instance wants: its content, or the operation that is fetching it."""
    entry = find_image(context, project, name)
    ready = entry is not None and entry.record.content is not None
    if policy == "always" or not (ready or entry):
        if policy == "never":
            raise not_found(
                f"image {name} is not on this host", hint=f"alveole image pull {name}, or run with --pull missing"
            )
        params = {"reference": normalise(name), "tls_verify": True}
        fetch = _plan_fetch(context, project, name, "image.pull", params=params, deadline_s=PULL_DEADLINE_S)
        return Plan({"image_operation": fetch.result.id}, fetch.compare, fetch.writes)
    assert entry is not None  # noqa: S101  (for the type checker: ready or entry holds)
    if ready:
        return Plan({"image": entry.record.content}, (unchanged(entry),))
    return Plan({"image_operation": entry.record.operation}, (unchanged(entry),))


async def remove(context: Context, project: str, name: str, idempotency: Idempotency | None = None) -> Operation:
    """Forget the name; the agent then collects what nothing uses. Raises CONFLICT while an instance uses it."""

    def plan() -> Plan[Operation]:
        entry = find_image(context, project, name)
        if entry is None:
            raise not_found(f"image {name} does not exist", hint="alveole image ls shows all")
        image: Image = entry.record
        if image.content is None:
            raise conflict(
                f"image {name} is being fetched",
                hint=f"alveole operation cancel {image.operation}, or wait for its end",
            )
        users = [
            e.record.name
            for e in context.cache.table(keys.collection(project, "instances"))
            if e.record.image is not None and e.record.image.digest == image.content.digest
        ]
        if users:
            raise conflict(f"image {name} is used by {', '.join(users[:5])}", hint="remove these instances first")
        operation = new_operation(
            context,
            project,
            "image.rm",
            f"image/{familiar(image.name)}",
            node=task_node(context.cache),
            deadline_s=PULL_DEADLINE_S,
        )
        return Plan(
            operation,
            (unchanged(entry),),
            (Delete(key=entry.key), put(keys.operation(project, operation.id), operation)),
        )

    return await commit_operation(context, project, idempotency, plan)
