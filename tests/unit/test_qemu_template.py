"""Templates as files: made once, never seen half made, and kept only while they are whole and of use."""

import asyncio
import logging
import os
import time
from pathlib import Path

import pytest

from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.qemu.template import MEMORY, STATE, TemplateRecord, Templates, key_of

SHAPE, VERSIONS = ("-m", "512M"), ("10.0", "6.12")
KEY = key_of(SHAPE, VERSIONS)


class Builder:
    """Writes what it is told, and counts."""

    def __init__(self, key: str = KEY, qemu: str = "10.0") -> None:
        self.key, self.qemu, self.built = key, qemu, 0

    async def build(self, target: Path) -> TemplateRecord:
        self.built += 1
        (target / MEMORY).write_bytes(b"memory" * 1000)
        await asyncio.sleep(0)
        (target / STATE).write_bytes(b"state")
        return TemplateRecord(
            key=self.key,
            memory_mib=512,
            cpus=1,
            tty=False,
            root_bytes=1 << 30,
            accelerator="tcg",
            kernel="6.12",
            initramfs="initramfs-0",
            qemu=self.qemu,
            created_at=time.time(),
            boot_s=1.0,
            private_bytes=6000,
        )


def test_a_key_depends_on_every_word_and_where_it_ends() -> None:
    keys = {
        KEY,
        key_of(("-m", "513M"), VERSIONS),
        key_of(("-m512M",), VERSIONS),
        key_of(("-m", "512M", ""), VERSIONS),
        key_of(SHAPE, ("10.1", "6.12")),
        key_of((*SHAPE, "10.0"), ("6.12",)),
    }
    assert len(keys) == 6
    assert key_of(list(SHAPE), list(VERSIONS)) == KEY
    assert len(KEY) == 16


async def test_it_is_made_once_however_many_ask(tmp_path: Path) -> None:
    templates, builder = Templates(tmp_path), Builder()
    found = await asyncio.gather(*(templates.ensure(KEY, builder.build) for _ in range(5)))
    assert builder.built == 1
    assert len({template.directory for template in found}) == 1
    assert [record.key for _, record in templates.all()] == [KEY]
    await Templates(tmp_path).ensure(KEY, builder.build)
    assert builder.built == 1


@pytest.mark.parametrize("damage", ["memory", "state", "lost", "record"])
async def test_a_damaged_one_is_made_anew_by_the_next_daemon(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is told: in the log, and as the cause of the new one."""
    builder = Builder()
    template = await Templates(tmp_path).ensure(KEY, builder.build)
    if damage == "lost":
        template.state.unlink()
    elif damage == "record":
        (template.directory / "about.json").write_text("{")
    else:
        path = template.directory / damage
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    again = await Templates(tmp_path).ensure(KEY, builder.build)
    assert builder.built == 2
    assert again.state.read_bytes() == b"state"
    assert again.record().cause == "damaged"
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"template {KEY} is damaged" in said


async def test_one_that_fails_leaves_nothing_and_the_next_may_succeed(tmp_path: Path) -> None:
    templates, builder = Templates(tmp_path), Builder()

    async def fail(target: Path) -> TemplateRecord:
        (target / MEMORY).write_bytes(b"half")
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        await templates.ensure(KEY, fail)
    assert not list(tmp_path.iterdir())
    await templates.ensure(KEY, builder.build)
    assert builder.built == 1


async def test_what_a_killed_daemon_left_is_in_nobodys_way(tmp_path: Path) -> None:
    templates, builder = Templates(tmp_path), Builder()
    templates.half_made(KEY).mkdir()
    (templates.half_made(KEY) / MEMORY).write_bytes(b"half")
    template = await templates.ensure(KEY, builder.build)
    assert template.memory.read_bytes() == b"memory" * 1000


async def test_a_sweep_keeps_what_is_whole_and_of_use(tmp_path: Path) -> None:
    templates = Templates(tmp_path)
    await templates.sweep(lambda _files, _record: True)  # nothing is there yet
    for key, qemu in (("new", "10.0"), ("old", "9.2"), ("bad", "10.0")):
        await templates.ensure(key, Builder(key, qemu).build)
    (tmp_path / "bad/about.json").write_text("[]")
    for name in ("half.new", "half.gone"):
        (tmp_path / name).mkdir()
    await templates.sweep(lambda _files, record: record.qemu == "10.0")
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


async def test_what_machines_hold_of_a_removed_one_is_told_and_stays(tmp_path: Path) -> None:
    templates, builder = Templates(tmp_path / "templates"), Builder()
    template = await templates.ensure(KEY, builder.build)
    size_bytes = template.size_bytes()
    memory_bytes = template.memory.stat().st_blocks * 512
    mine = tmp_path / "mine"
    mine.hardlink_to(template.memory)
    assert await templates.remove(KEY) == (size_bytes - memory_bytes, memory_bytes)
    assert mine.read_bytes() == b"memory" * 1000
    assert not list((tmp_path / "templates").iterdir())
    await templates.ensure(KEY, builder.build)
    assert builder.built == 2
    assert await templates.remove(KEY) == (size_bytes, 0)
    assert await templates.remove(KEY) == (0, 0), "it may be asked for again"


async def test_one_that_cannot_be_read_can_be_removed(tmp_path: Path) -> None:
    templates = Templates(tmp_path)
    template = await templates.ensure(KEY, Builder().build)
    template.memory.unlink()
    assert await templates.remove(KEY) == (0, 0)
    assert not list(tmp_path.iterdir())


async def test_a_removal_waits_for_who_makes_it(tmp_path: Path) -> None:
    templates, builder = Templates(tmp_path), Builder()

    async def wanted() -> bytes:
        template = await templates.ensure(KEY, builder.build)
        return template.state.read_bytes()

    content, _ = await asyncio.gather(wanted(), templates.remove(KEY))
    assert content == b"state"
    assert not list(tmp_path.iterdir())


async def test_a_refreshed_one_is_another_and_the_old_one_serves_until_then(tmp_path: Path) -> None:
    templates, builder, go_on = Templates(tmp_path), Builder(), asyncio.Event()
    before = (await templates.ensure(KEY, builder.build)).memory.stat().st_ino

    async def slowly(target: Path) -> TemplateRecord:
        await go_on.wait()
        return await builder.build(target)

    refreshing = asyncio.ensure_future(templates.refresh(KEY, slowly))
    while not templates.half_made(KEY).exists():  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert (await templates.ensure(KEY, slowly)).memory.stat().st_ino == before
    go_on.set()
    await refreshing
    after = await templates.ensure(KEY, slowly)
    assert after.memory.stat().st_ino != before
    assert after.record().cause == "refreshed"
    assert [path.name for path in tmp_path.iterdir()] == [KEY]
    assert builder.built == 2


async def test_a_refresh_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    templates = Templates(tmp_path)

    async def fail(_target: Path) -> TemplateRecord:
        raise RuntimeError("no room")

    with pytest.raises(AlveoleError) as caught:
        await templates.refresh(KEY, fail)
    assert caught.value.code is ErrorCode.NOT_FOUND
    before = await templates.ensure(KEY, Builder().build)
    inode = before.memory.stat().st_ino
    with pytest.raises(RuntimeError, match="no room"):
        await templates.refresh(KEY, fail)
    assert (await Templates(tmp_path).ensure(KEY, fail)).memory.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


@pytest.mark.parametrize("killed", ["between the names", "before the old one was gone"])
async def test_a_daemon_killed_in_a_refresh_has_lost_nothing(tmp_path: Path, killed: str) -> None:
    templates = Templates(tmp_path)
    template = await templates.ensure(KEY, Builder().build)
    old = tmp_path / f"{KEY}.old"
    if killed == "between the names":
        template.directory.rename(old)
    else:
        old.mkdir()
    await Templates(tmp_path).sweep(lambda _files, _record: True)
    assert [path.name for path in tmp_path.iterdir()] == [KEY]
    assert template.state.read_bytes() == b"state"


async def test_when_it_was_last_used_is_known(tmp_path: Path) -> None:
    templates = Templates(tmp_path)
    template = await templates.ensure(KEY, Builder().build)
    os.utime(template.directory / "about.json", (1000.0, 1000.0))
    assert template.used_at() == 1000.0
    began = time.time()
    await templates.ensure(KEY, Builder().build)
    assert template.used_at() >= began - 1


async def test_whether_it_was_compared_is_known(tmp_path: Path) -> None:
    await Templates(tmp_path).ensure(KEY, Builder().build)
    templates = Templates(tmp_path)
    assert not templates.is_checked(KEY)
    await templates.ensure(KEY, Builder().build)
    assert templates.is_checked(KEY)
    await templates.remove(KEY)
    assert not templates.is_checked(KEY)
