"""Templates: what a machine of one shape has become when it waits for its seed. Machines go on from there.

A template holds nothing of any image or instance: the guest mounts its root disk after that point. It is three files:
memory (sparse, mapped privately by every machine that goes on from it and so shared by all), state (of the devices),
and about.json with the digests of both. It never changes; when anything that its shape or content depends on changes,
it gets another key.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from alveole.host import pages
from alveole.host.blocking import in_thread
from alveole.host.process import run
from alveole.model.base import Record

MEMORY, STATE = "memory", "state"
_ABOUT = "about.json"
_DIGEST_TIMEOUT_S = 300.0


class TemplateRecord(Record):
    """``about.json``."""

    key: str
    memory_mib: int
    cpus: int
    accelerator: str
    kernel: str
    initramfs: str
    qemu: str
    created_at: float  # seconds since the epoch
    boot_s: float  # how long its machine took to boot
    private_bytes: int  # of memory that its machine had written
    digests: tuple[str, str]  # sha256 of memory and state


@dataclass(frozen=True, slots=True)
class Template:
    directory: Path

    @property
    def memory(self) -> Path:
        return self.directory / MEMORY

    @property
    def state(self) -> Path:
        return self.directory / STATE

    def record(self) -> TemplateRecord:
        return TemplateRecord.from_json((self.directory / _ABOUT).read_bytes())


def key_of(shape: Sequence[str], versions: Sequence[str]) -> str:
    return sha256(json.dumps([shape, versions]).encode()).hexdigest()[:16]


class Templates:
    def __init__(self, directory: Path) -> None:
        """``directory`` persists and is this daemon's own."""
        self._directory = directory
        self._locks: dict[str, asyncio.Lock] = {}
        self._checked: set[str] = set()

    async def ensure(self, key: str, build: Callable[[Path], Awaitable[TemplateRecord]]) -> Template:
        """The template of a key. If there is none, or it is damaged, ``build`` makes one in the directory it is given:
        its two files; the record it returns still lacks the digests. Once, however many ask."""
        template = Template(self._directory / key)
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._checked and not await self._is_sound(template):
                await self.remove(key)
                await self._make(template, build)
            self._checked.add(key)
        return template

    async def _make(self, template: Template, build: Callable[[Path], Awaitable[TemplateRecord]]) -> None:
        new = self.half_made(template.directory.name)
        await in_thread(partial(shutil.rmtree, new, ignore_errors=True))
        new.mkdir(parents=True, mode=0o711)
        try:
            record = await build(new)
            record = record.replace(digests=await _digests(Template(new)))
            (new / _ABOUT).write_bytes(record.to_json())
            new.rename(template.directory)
        except BaseException:
            await in_thread(partial(shutil.rmtree, new, ignore_errors=True))
            raise

    async def _is_sound(self, template: Template) -> bool:
        try:
            record = template.record()
        except (OSError, ValueError):
            return False
        return all(file.exists() for file in (template.memory, template.state)) and (
            await _digests(template) == record.digests
        )

    async def remove(self, key: str) -> None:
        """Machines that go on from it keep its memory until they end. Nothing happens if there is none."""
        self._checked.discard(key)
        doomed = self._directory / f"{key}.gone"
        if (self._directory / key).exists():
            (self._directory / key).rename(doomed)
        await in_thread(partial(shutil.rmtree, doomed, ignore_errors=True))

    def all(self) -> tuple[TemplateRecord, ...]:
        """Those that are whole, by key."""
        found = sorted(self._directory.glob("*/" + _ABOUT)) if self._directory.exists() else []
        return tuple(Template(path.parent).record() for path in found if path.parent.suffix == "")

    def half_made(self, key: str) -> Path:
        """Where it is while it is made."""
        return self._directory / f"{key}.new"

    async def sweep(self, is_of_use: Callable[[TemplateRecord], bool]) -> None:
        """Remove what a killed daemon left half made or half removed, what is damaged, and what is of no use."""
        for path in sorted(self._directory.glob("*")):
            if path.suffix or not await in_thread(partial(_is_of_use, Template(path), is_of_use)):
                await in_thread(partial(shutil.rmtree, path, ignore_errors=True))


def _is_of_use(template: Template, judge: Callable[[TemplateRecord], bool]) -> bool:
    try:
        return judge(template.record())
    except (OSError, ValueError):
        return False


async def _digests(template: Template) -> tuple[str, str]:
    argv = [sys.executable, "-ISs", pages.__file__, "digest", str(template.memory), str(template.state)]
    memory, state = (await run(argv, timeout_s=_DIGEST_TIMEOUT_S)).text.split()
    return memory, state
