"""Templates: what a machine of one shape has become when it waits for its seed. Machines go on from there.

A template holds nothing of any image or instance: the guest mounts its root disk after that point. It is three files:
memory (sparse, mapped privately by every machine that goes on from it and so shared by all), state (of the devices),
and about.json with the digests of both. It never changes; when anything that its shape or content depends on changes,
it gets another key. A machine links what it needs before it goes on, so it can be removed or replaced at any time.
"""

import asyncio
import json
import logging
import os
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
from alveole.model.error import AlveoleError, not_found
from alveole.model.template import Cause

log = logging.getLogger(__name__)
MEMORY, STATE = "memory", "state"
_ABOUT = "about.json"
_REPLACED = ".old"
_BLOCK_BYTES = 512  # the unit of st_blocks
_DIGEST_TIMEOUT_S = 300.0


class TemplateRecord(Record):
    """``about.json``."""

    key: str
    memory_mib: int
    cpus: int
    tty: bool
    root_bytes: int  # size of the root disk that its machine had
    accelerator: str
    kernel: str
    initramfs: str
    qemu: str
    created_at: float  # seconds since the epoch
    boot_s: float  # how long its machine took to boot
    private_bytes: int  # of memory that its machine had written
    cause: Cause = "wanted"
    digests: tuple[str, str] = ("", "")  # sha256 of memory and state


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
        """Raises OSError or ValueError if it cannot be read."""
        return TemplateRecord.from_json((self.directory / _ABOUT).read_bytes())

    def used_at(self) -> float:
        """When a machine last went on from it, in seconds since the epoch. Raises OSError if it is not there."""
        return (self.directory / _ABOUT).stat().st_mtime

    def note_use(self) -> None:
        os.utime(self.directory / _ABOUT)

    def size_bytes(self) -> int:
        """What its files take of the disk. Raises OSError if one is not there."""
        return sum(_allocated(file.stat()) for file in (self.memory, self.state))

    def held_bytes(self) -> int:
        """Of these, what machines that go on from it would still hold if it were removed."""
        found = self.memory.stat()
        return _allocated(found) if found.st_nlink > 1 else 0


Build = Callable[[Path], Awaitable[TemplateRecord]]
"""Makes the two files in the directory it is given. The record it returns lacks the digests and the cause."""


def key_of(shape: Sequence[str], versions: Sequence[str]) -> str:
    return sha256(json.dumps([shape, versions]).encode()).hexdigest()[:16]


class Templates:
    def __init__(self, directory: Path) -> None:
        """``directory`` persists and is this daemon's own."""
        self._directory = directory
        self._locks: dict[str, asyncio.Lock] = {}
        self._checked: set[str] = set()

    async def ensure(self, key: str, build: Build) -> Template:
        """The template of a key, made if there is none or it is damaged: once, however many ask.

        It may be removed as soon as the caller awaits anything: what is wanted of it is to be linked before.
        """
        template = Template(self._directory / key)
        if key not in self._checked:
            async with self._lock(key):
                if key not in self._checked:
                    await self._make_sound(template, build)
                    self._checked.add(key)
        template.note_use()
        return template

    async def refresh(self, key: str, build: Build) -> None:
        """Make it afresh. Machines that begin meanwhile go on from the old one, if that is known to be sound.

        Raises NOT_FOUND if there is none.
        """
        template, old = Template(self._directory / key), self._directory / f"{key}{_REPLACED}"
        async with self._lock(key):
            if not template.directory.exists():
                raise absent(key)
            await _discard(old)
            new = await self._build(key, build, "refreshed")
            template.directory.rename(old)
            new.rename(template.directory)
            self._checked.add(key)
            await _discard(old)

    async def remove(self, key: str) -> tuple[int, int]:
        """Returns how many bytes that freed, and how many will be when the machines have ended that go on from it: they
        keep its memory. Nothing happens if there is none."""
        template = Template(self._directory / key)
        async with self._lock(key):
            if not template.directory.exists():
                return 0, 0
            size_bytes, held_bytes = await in_thread(lambda: _sizes(template))
            await self._remove(key)
        return size_bytes - held_bytes, held_bytes

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    async def _make_sound(self, template: Template, build: Build) -> None:
        key = template.directory.name
        cause: Cause = "wanted"
        if template.directory.exists():
            if await self._is_sound(template):
                return
            log.warning("template %s is damaged: its files are not what was written; it is made anew", key)
            cause = "damaged"
            await self._remove(key)
        (await self._build(key, build, cause)).rename(template.directory)

    async def _build(self, key: str, build: Build, cause: Cause) -> Path:
        """Everything but its name."""
        new = self.half_made(key)
        await _discard(new)
        new.mkdir(parents=True, mode=0o711)
        try:
            record = await build(new)
            record = record.replace(digests=await _digests(Template(new)), cause=cause)
            (new / _ABOUT).write_bytes(record.to_json())
        except BaseException:
            await _discard(new)
            raise
        return new

    async def _is_sound(self, template: Template) -> bool:
        try:
            record = template.record()
        except (OSError, ValueError):
            return False
        return all(file.exists() for file in (template.memory, template.state)) and (
            await _digests(template) == record.digests
        )

    async def _remove(self, key: str) -> None:
        doomed = self._directory / f"{key}.gone"
        await _discard(doomed)
        self._checked.discard(key)
        (self._directory / key).rename(doomed)
        await _discard(doomed)

    def all(self) -> tuple[tuple[Template, TemplateRecord], ...]:
        """Those that can be read, by key."""
        found = (Template(path.parent) for path in sorted(self._directory.glob("*/" + _ABOUT)))
        return tuple((template, record) for template in found if (record := _readable(template)) is not None)

    def is_checked(self, key: str) -> bool:
        """Whether its files have been compared since this daemon started. They are when a machine wants it."""
        return key in self._checked

    def half_made(self, key: str) -> Path:
        """Where it is while it is made."""
        return self._directory / f"{key}.new"

    async def sweep(self, is_of_use: Callable[[Template, TemplateRecord], bool]) -> None:
        """Remove what a killed daemon left half made or half removed, what is damaged, and what is of no use."""
        for old in self._directory.glob(f"*{_REPLACED}"):
            if not old.with_suffix("").exists():  # killed between two names: nothing was lost yet
                old.rename(old.with_suffix(""))
        for path in sorted(self._directory.glob("*")):
            if path.suffix or not await in_thread(partial(_is_of_use, Template(path), is_of_use)):
                await _discard(path)


def _is_of_use(template: Template, judge: Callable[[Template, TemplateRecord], bool]) -> bool:
    record = _readable(template)
    return record is not None and judge(template, record)


def _readable(template: Template) -> TemplateRecord | None:
    if template.directory.suffix:
        return None
    try:
        return template.record()
    except (OSError, ValueError):
        return None


async def _discard(directory: Path) -> None:
    await in_thread(partial(shutil.rmtree, directory, ignore_errors=True))


def absent(key: str) -> AlveoleError:
    return not_found(f"template {key} does not exist", hint="alveole template ls shows all")


def _allocated(found: os.stat_result) -> int:
    return found.st_blocks * _BLOCK_BYTES


def _sizes(template: Template) -> tuple[int, int]:
    try:
        return template.size_bytes(), template.held_bytes()
    except OSError:  # damaged: it can be removed all the same
        return 0, 0


async def _digests(template: Template) -> tuple[str, str]:
    argv = [sys.executable, "-ISs", pages.__file__, "digest", str(template.memory), str(template.state)]
    memory, state = (await run(argv, timeout_s=_DIGEST_TIMEOUT_S)).text.split()
    return memory, state
