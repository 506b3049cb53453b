"""`alveole image`."""

import tomllib
from pathlib import Path
from typing import Any

import click

from alveole.cli import output
from alveole.cli.context import client, each
from alveole.cli.options import format_option, inspect_each, quiet_option, record_format_option
from alveole.cli.progress import finish
from alveole.cli.specoptions import complete_images

_IMAGES = click.argument("images", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_images)


@click.group()
def command() -> None:
    """Pull, build, import and remove images."""


@command.command("ls")
@quiet_option
@format_option
def list_images(quiet: bool, form: str) -> None:
    """List images.

    \b
    Example:
      alveole image ls
    """
    found = client().images()
    if quiet:
        for image in found:
            output.line(image["name"])
    elif form == "table":
        output.table(("NAME", "DIGEST", "SIZE", "CONTENT", "AGE", "STATE"), map(_row, found))
    else:
        output.records(found, form)


def _row(image: dict[str, Any]) -> tuple[str, ...]:
    content = image.get("content", {})
    return (
        image["name"],
        output.short_digest(content.get("digest", "")),
        output.size(content.get("size_bytes")),
        _content(content) if content else "",
        output.age(image["created_at"]),
        image.get("phase", "ready"),
    )


def _content(content: dict[str, Any]) -> str:
    if disk := content.get("disk"):
        return f"disk of {output.size(disk['virtual_size_bytes'])}"
    count = len(content["layers"])
    return f"{count} layer" if count == 1 else f"{count} layers"


@command.command()
@click.option("--tls-verify/--no-tls-verify", default=True, show_default=True, help="Check the registry's certificate.")
@click.argument("references", metavar="REFERENCE...", nargs=-1, required=True)
def pull(references: tuple[str, ...], tls_verify: bool) -> None:
    """Fetch images from a registry, newer ones too.

    \b
    Examples:
      alveole image pull debian:12
      alveole image pull --no-tls-verify localhost:5000/web:1.2
    """

    def fetch(reference: str) -> None:
        def submit(wait_s: float) -> dict[str, Any]:
            return client().pull_image(reference, tls_verify=tls_verify, wait_s=wait_s)

        _print_image(finish(client(), submit), reference)

    each(references, fetch)


@command.command()
@click.option("--no-cache", is_flag=True, help="Carry out every step again.")
@click.argument("name")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def build(name: str, recipe: Path, no_cache: bool) -> None:
    """Build an image from a recipe (TOML). Its relative paths begin where the recipe is.

    \b
    Example:
      alveole image build web:1.2 web/recipe.toml
    """
    try:
        content = tomllib.loads(recipe.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise click.UsageError(f"RECIPE {recipe}: {error}; valid: a TOML file") from error
    directory = str(recipe.resolve().parent)

    def submit(wait_s: float) -> dict[str, Any]:
        return client().build_image(name, content, directory, use_cache=not no_cache, wait_s=wait_s)

    _print_image(finish(client(), submit), name)


@command.command("import")
@click.option(
    "--type",
    "form",
    type=click.Choice(["oci-layout", "docker-archive", "rootfs", "qcow2", "raw"]),
    default="rootfs",
    show_default=True,
    help="What PATH is. It is never guessed.",
)
@click.argument("name")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
def import_image(name: str, path: Path, form: str) -> None:
    """Make an image of a file or directory of this host.

    qcow2 and raw are disks of whole operating systems, for instances with --isolation vm.

    \b
    Examples:
      alveole image import debian:mine rootfs.tar
      alveole image import --type oci-layout web:1.2 ./layout
      alveole image import --type docker-archive web:1.2 saved.tar
      alveole image import --type qcow2 debian:cloud debian-12-generic-amd64.qcow2
      alveole image import --type raw legacy:2009 old-server.img
    """
    source = str(path.resolve())

    def submit(wait_s: float) -> dict[str, Any]:
        return client().import_image(name, source, form, wait_s=wait_s)

    _print_image(finish(client(), submit), name)


@command.command("rm")
@_IMAGES
def remove(images: tuple[str, ...]) -> None:
    """Remove images that no instance uses.

    \b
    Example:
      alveole image rm debian:12
    """

    def drop(name: str) -> None:
        finish(client(), lambda wait_s: client().remove_image(name, wait_s=wait_s))
        output.line(name)

    each(images, drop)


@command.command()
@record_format_option
@_IMAGES
def inspect(images: tuple[str, ...], form: str) -> None:
    """Show all that is known of images, as a list.

    \b
    Example:
      alveole image inspect debian:12
    """
    inspect_each(images, client().image, form)


def _print_image(operation: dict[str, Any], name: str) -> None:
    output.line(f"{operation['result'].get('name', name)}  {operation['result'].get('digest', '')}".rstrip())
