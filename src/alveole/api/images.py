"""Routes of images. Names may hold slashes."""

from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from alveole.api.service import (
    Route,
    Service,
    idempotency_of,
    list_response,
    operation_response,
    project_of,
    record_response,
    table,
)
from alveole.api.strict import read_body
from alveole.control import images
from alveole.model.base import Record
from alveole.model.error import not_found
from alveole.model.image import Image, Recipe
from alveole.model.operation import Operation

HostPath = Annotated[str, Field(pattern=r"^/[^\x00]*$")]
ImageName = Annotated[str, Field(min_length=1, max_length=512)]


class PullImage(Record):
    reference: ImageName
    tls_verify: bool = True


class ImportImage(Record):
    """``path`` is on the host of the daemon."""

    name: ImageName
    path: HostPath
    format: Literal["oci-layout", "docker-archive", "rootfs", "qcow2", "raw"]


class BuildImage(Record):
    """``directory`` is on the host of the daemon: where the recipe's relative paths begin."""

    name: ImageName
    recipe: Recipe
    directory: HostPath
    use_cache: bool = True


async def index(service: Service, request: Request) -> Response:
    return list_response(service, [entry.record for entry in table(service, request, "images")])


async def show(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    entry = images.find_image(service.context, project_of(request), name)
    if entry is None:
        raise not_found(f"image {name} does not exist", hint="alveole image ls shows all")
    return record_response(entry.record)


async def pull(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, PullImage)
    operation = await images.pull(
        service.context,
        project_of(request),
        body.reference,
        tls_verify=body.tls_verify,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def load(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, ImportImage)
    operation = await images.load(
        service.context,
        project_of(request),
        body.name,
        path=body.path,
        image_format=body.format,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def build(service: Service, request: Request) -> Response:
    body, raw = await read_body(request, BuildImage)
    operation = await images.build(
        service.context,
        project_of(request),
        body.name,
        recipe=body.recipe,
        directory=body.directory,
        use_cache=body.use_cache,
        idempotency=idempotency_of(request, raw),
    )
    return await operation_response(service, request, operation)


async def remove(service: Service, request: Request) -> Response:
    operation = await images.remove(
        service.context, project_of(request), request.path_params["name"], idempotency_of(request, None)
    )
    return await operation_response(service, request, operation)


ROUTES = (
    Route(method="GET", path="/images", summary="List images", handler=index, answer=Image, listing=True),
    Route(
        method="POST",
        path="/images/pull",
        summary="Fetch an image from a registry",
        handler=pull,
        body=PullImage,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path="/images/import",
        summary="Make an image from a file of the host",
        handler=load,
        body=ImportImage,
        answer=Operation,
        status=202,
    ),
    Route(
        method="POST",
        path="/images/build",
        summary="Make an image from a recipe",
        handler=build,
        body=BuildImage,
        answer=Operation,
        status=202,
    ),
    Route(method="GET", path="/images/{name:path}", summary="One image", handler=show, answer=Image),
    Route(
        method="DELETE",
        path="/images/{name:path}",
        summary="Forget an image; what nothing else uses is collected",
        handler=remove,
        answer=Operation,
        status=202,
    ),
)
