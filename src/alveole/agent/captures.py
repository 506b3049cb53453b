"""Moments of running instances, captured once and gone on from by any number of forks.

A moment is a directory with what the runtime wrote and, unless that is a root disk of the volume driver by the name
``moment-ID``, a copy of its root. It is complete or not there, and removed a while after the last fork took it, if no
other is known that will. Each fork takes a copy that shares all with it that can be shared: links of the files, and a
disk that shares its blocks.
"""

import asyncio
import shutil
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import cast
from weakref import WeakValueDictionary

from alveole.agent.record import Paths
from alveole.agent.roots import give_root, keep_root
from alveole.host.blocking import in_thread
from alveole.model.error import conflict
from alveole.model.instance import Origin
from alveole.runtime.base import Capturing, Handle, Runtime
from alveole.volume.base import VolumeDriver

KEPT_S = 5.0
MEMORY = "memory"
"""Of a moment's directory: what the runtime wrote."""


class Captures:
    def __init__(self) -> None:
        self.running: dict[str, Handle] = {}  # instances that run on this node now, by id
        self._taken: dict[str, float] = {}  # moment: when a fork took it last, by the monotonic clock
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # there while somebody waits

    async def take(
        self,
        paths: Paths,
        volumes: VolumeDriver,
        runtime: Runtime,
        origin: Origin,
        instance_id: str,
        *,
        ids_base: int,
        files: asyncio.Lock,
    ) -> Path:
        """The files of the moment for one fork, which has its root then. May be called again.

        ``ids_base`` is the range of ids of the fork's files. ``files`` is held by the keeper of the origin while it
        makes, adopts or removes that. Raises CONFLICT if the instance does not run any more.
        """
        mine = paths.origin(instance_id)
        if mine.exists():  # also if a former daemon took it: its files come last
            return mine
        async with self._locks.setdefault(origin.moment, asyncio.Lock()):
            self._taken[origin.moment] = time.monotonic()
            moment = paths.moments / origin.moment
            if not moment.exists():
                async with files:
                    await self._capture(moment, paths, volumes, runtime, origin)
            # Also if it has one: of an earlier capture, if this was cut short after that.
            disk = _disk(origin.moment)
            await give_root(paths, volumes, runtime, instance_id, disk=disk, moment=moment, ids_base=ids_base)
            await in_thread(partial(link_all, moment / MEMORY, mine))
            self._taken[origin.moment] = time.monotonic()
        return mine

    async def _capture(
        self, moment: Path, paths: Paths, volumes: VolumeDriver, runtime: Runtime, origin: Origin
    ) -> None:
        handle = self.running.get(origin.instance_id)
        if handle is None:
            raise conflict(f"instance {origin.instance} does not run any more", hint="start it, then fork it")
        new = moment.with_suffix(".new")
        await in_thread(partial(shutil.rmtree, new, ignore_errors=True))
        (new / MEMORY).mkdir(parents=True, mode=0o700)

        async def copy_root() -> None:
            disk = _disk(origin.moment)
            await keep_root(paths, volumes, runtime, origin.instance_id, disk=disk, moment=new)

        try:
            await volumes.remove_root_disk(_disk(origin.moment))
            await cast("Capturing", runtime).capture(handle, new / MEMORY, copy_root, go_on=True)
            new.rename(moment)
        except BaseException:
            await volumes.remove_root_disk(_disk(origin.moment))
            await in_thread(partial(shutil.rmtree, new, ignore_errors=True))
            raise

    async def sweep(self, paths: Paths, volumes: VolumeDriver, wanted: Collection[str] = ()) -> None:
        """Remove moments that no fork took for a while, and those of a former daemon, but those that are ``wanted``."""
        if not paths.moments.exists():
            return
        for moment in tuple(paths.moments.iterdir()):
            name = moment.name.partition(".")[0]
            lock = self._locks.setdefault(name, asyncio.Lock())
            is_fresh = time.monotonic() - self._taken.get(name, -KEPT_S) < KEPT_S
            if name in wanted or is_fresh or lock.locked():
                continue
            async with lock:
                await in_thread(partial(shutil.rmtree, moment, ignore_errors=True))
                await volumes.remove_root_disk(_disk(name))
                self._taken.pop(name, None)


def _disk(moment: str) -> str:
    return f"moment-{moment}"


def link_all(source: Path, target: Path) -> None:
    """All files of a directory by other names; nothing if ``target`` is there already."""
    if target.exists():
        return
    new = target.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for file in source.iterdir():
        (new / file.name).hardlink_to(file)
    new.rename(target)
