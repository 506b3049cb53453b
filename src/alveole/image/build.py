"""Builds images from recipes: base, packages, files, commands; each step a layer, made again only when it changed."""

import asyncio
import os
import shlex
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from alveole.host.identity import Identity
from alveole.host.process import BASE_ENVIRONMENT, run
from alveole.image import debian, system_script
from alveole.image.base import Format, Progress
from alveole.image.build_cache import BuildCache, step_key
from alveole.image.build_cell import STEP_TIMEOUT_S, TAR_TIMEOUT_S, BuildCell, Command, remove_tree, write_tar
from alveole.image.build_config import build_environment, image_config
from alveole.image.fetch import architecture
from alveole.image.layer_tar import Files
from alveole.image.system_disk import make_disk
from alveole.model.error import invalid, unsupported
from alveole.model.image import ImageConfig, ImageContent, Recipe, RecipeFile
from alveole.runtime.base import CellMount

_SHOWN_CHARACTERS = 200


class Layers(Protocol):
    """What building needs of the image store."""

    async def add_layer_tar(self, tar_path: Path, progress: Progress) -> str: ...

    async def add_image(self, layers: Sequence[str], config: ImageConfig) -> ImageContent: ...

    async def load(self, path: Path, format: Format, progress: Progress) -> ImageContent: ...  # noqa: A002

    def has_layer(self, diff_id: str) -> bool: ...

    def layer_directory(self, diff_id: str) -> Path: ...

    def building(self) -> AbstractAsyncContextManager[Callable[[str], None]]:
        """While inside, no layer that is added or that the function is called with is collected."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """``make`` writes a layer's tar to the path it is given, over the layers in the directories given."""

    title: str
    make: Callable[[Path, Sequence[Path]], Awaitable[None]]
    definition: tuple[object, ...] | None
    """All that its result depends on besides the layers below, as JSON; None: it is quick and always made."""


class Builder:
    """One build at a time: all use the same range of ids, and the second often finds its layers made by the first."""

    def __init__(self, store: Layers, root: Path, identity: Identity) -> None:
        """``root`` is a directory of ours. What containers see lies in the state directory, which they may pass."""
        self._store = store
        self._work = identity.state / "build" / "work"
        self._cell = BuildCell(identity.state / "build" / "cell", identity)
        self._cache = BuildCache(root / "build-cache", store.has_layer)
        self._turn = asyncio.Lock()

    async def build(
        self, recipe: Recipe, directory: Path, base: ImageContent | None, *, use_cache: bool, progress: Progress
    ) -> ImageContent:
        """The image of ``recipe``, whose relative paths begin at ``directory``, on ``base`` if it names an image.

        Raises AlveoleError: INVALID naming the step and its last words if one fails; UNSUPPORTED if the host lacks
        what a step needs. Layers of the steps before stay for the next try; nothing else does.
        """
        if recipe.base_image and base is None:
            raise invalid(f"base image {recipe.base_image} is not here", hint="pull it first", field="base")
        if recipe.base == "scratch" and not recipe.files:
            raise invalid("there is nothing in this image: base is scratch and there are no files", field="files")
        if recipe.disk_mib is not None and architecture() != "amd64":
            raise unsupported("disks that boot are made for amd64 alone", hint="import a disk instead")
        if self._turn.locked():
            progress("waiting for another build to end")
        base_config = base.config if base else ImageConfig()
        layers = list(base.layers) if base else []
        async with self._turn, self._store.building() as hold:
            await self.recover()
            for layer in layers:
                hold(layer)
            try:
                steps = await self._steps(recipe, directory, build_environment(recipe, base_config), progress)
                for number, step in enumerate(steps, 1):
                    progress(f"step {number}/{len(steps)}: {step.title}")
                    layers.append(await self._layer(step, layers, use_cache, progress))
                    hold(layers[-1])
                if recipe.disk_mib is not None:
                    return await self._disk(recipe.disk_mib, layers, progress)
                return await self._store.add_image(layers, image_config(recipe, base_config))
            finally:
                await self._clear()

    async def _disk(self, size_mib: int, layers: Sequence[str], progress: Progress) -> ImageContent:
        """One disk of all layers, which stay for the next build."""
        progress(f"making a disk of {size_mib} MiB")
        await remove_tree(self._work)
        self._work.mkdir(mode=0o711, parents=True)
        output = self._work / "disk"
        async with self._cell.tree([self._store.layer_directory(layer) for layer in layers]) as tree:
            await make_disk(tree, size_mib, output)
        return await self._store.load(output, "raw", progress)

    async def recover(self) -> None:
        """Remove what a killed daemon's build left: processes, mounts, files."""
        await self._clear()
        self._cache.prune()

    async def _clear(self) -> None:
        await self._cell.remove()
        await remove_tree(self._work.parent)

    async def _layer(self, step: _Step, layers: Sequence[str], use_cache: bool, progress: Progress) -> str:
        key = "" if step.definition is None else step_key(layers, *step.definition)
        if key and use_cache and (known := self._cache.layer(key)):
            progress("unchanged")
            return known
        await remove_tree(self._work)
        self._work.parent.mkdir(mode=0o711, exist_ok=True)
        self._work.mkdir(mode=0o711)
        output = self._work / "layer.tar"
        await step.make(output, [self._store.layer_directory(layer) for layer in layers])
        if not key and self._store.has_layer(layer := await _diff_id(output)):
            progress("unchanged")
            return layer
        layer = await self._store.add_layer_tar(output, progress)
        if key:
            self._cache.remember(key, layer)
        return layer

    async def _steps(
        self, recipe: Recipe, directory: Path, env: Mapping[str, str], progress: Progress
    ) -> tuple[_Step, ...]:
        steps = []
        if recipe.suite:
            identity = await debian.bootstrap_identity(recipe.suite)
            make = partial(self._bootstrap, recipe.suite)
            steps.append(_Step(title=f"Debian {recipe.suite}", make=make, definition=("debian", identity)))
        system = () if recipe.disk_mib is None else system_script.PACKAGES
        if packages := (*system, *recipe.packages):
            lines = debian.host_lines(recipe.suite or debian.ANY_SUITE)
            make = partial(self._install, packages, lines, progress)
            definition = ("packages", packages, debian.INSTALL_SCRIPT, lines)
            steps.append(_Step(title=f"packages {' '.join(packages)}", make=make, definition=definition))
        if recipe.files:
            make = partial(self._files, recipe.files, directory)
            steps.append(_Step(title=f"{len(recipe.files)} files", make=make, definition=None))
        for number, args in enumerate(recipe.commands):
            command = Command(args=args, env=env, network=recipe.network == "host")
            make = partial(self._command, command, _shown(args), f"commands.{number}", progress)
            inputs = (args, sorted(env.items()), recipe.network)
            steps.append(_Step(title=_shown(args), make=make, definition=("command", *inputs)))
        if system:
            title = "what it needs to boot"
            args = ("/bin/sh", "-c", system_script.SCRIPT)
            command = Command(args=args, env={"PATH": BASE_ENVIRONMENT["PATH"]}, network=False)
            make = partial(self._command, command, title, "disk_mib", progress)
            steps.append(_Step(title=title, make=make, definition=("system", system_script.SCRIPT)))
        return tuple(steps)

    async def _bootstrap(self, suite: str, output: Path, layers: Sequence[Path]) -> None:
        await debian.bootstrap(suite, self._work, output, timeout_s=STEP_TIMEOUT_S)

    async def _install(
        self, packages: Sequence[str], lines: Sequence[str], progress: Progress, output: Path, layers: Sequence[Path]
    ) -> None:
        apt = self._work / "apt"
        await debian.write_apt_files(apt, lines)
        mounts = [CellMount(target=debian.APT_INSIDE, source=apt, read_only=True)]
        for target in ("/var/cache/apt", "/var/lib/apt/lists"):
            source = self._work / target.replace("/", "-")
            source.mkdir()
            os.chown(source, self._cell.root_id, self._cell.root_id)
            mounts.append(CellMount(target=target, source=source))
        args = ("/bin/sh", "-c", debian.INSTALL_SCRIPT, "sh", *packages)
        command = Command(args=args, env={"PATH": BASE_ENVIRONMENT["PATH"]}, network=True, mounts=tuple(mounts))
        title = f"installing {' '.join(packages)}"
        await self._command(command, title, "packages", progress, output, layers)

    async def _files(self, files: Sequence[RecipeFile], directory: Path, output: Path, layers: Sequence[Path]) -> None:
        request = Files(
            directory=str(directory),
            files=[file.model_dump(mode="json") for file in files],
            layers=[str(layer) for layer in layers],
            mtime_s=debian.SOURCE_DATE_EPOCH_S,
        )
        await write_tar(request, output)

    async def _command(  # noqa: PLR0917
        self, command: Command, title: str, field: str, progress: Progress, output: Path, layers: Sequence[Path]
    ) -> None:
        ended = await self._cell.run(command, layers, output, progress)
        if ended.code != 0:
            how = f"exit code {ended.code}" if ended.code > 0 else f"killed by signal {-ended.code}"
            words = "\n".join(ended.last) or "it said nothing"
            raise invalid(f"{title} failed with {how}: {words}", hint="correct the recipe", field=field)


async def _diff_id(tar: Path) -> str:
    result = await run(("sha256sum", "--", str(tar)), timeout_s=TAR_TIMEOUT_S)
    return f"sha256:{result.text.split()[0]}"


def _shown(args: Sequence[str]) -> str:
    """One line for a user: what a shell is given is shown as it was written."""
    text = args[2] if args[:2] == ("/bin/sh", "-c") and len(args) == 3 else shlex.join(args)
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."
