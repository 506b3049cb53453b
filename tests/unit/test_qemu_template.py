"""Templates as files: made once, never seen half made, and kept only while they are whole and of use."""

import asyncio
import time
from pathlib import Path

import pytest

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
            accelerator="tcg",
            kernel="6.12",
            initramfs="initramfs-0",
            qemu=self.qemu,
            created_at=time.time(),
            boot_s=1.0,
            private_bytes=6000,
            digests=("", ""),
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
    assert [record.key for record in templates.all()] == [KEY]
    await Templates(tmp_path).ensure(KEY, builder.build)
    assert builder.built == 1


@pytest.mark.parametrize("damage", ["memory", "state", "lost", "record"])
async def test_a_damaged_one_is_made_anew_by_the_next_daemon(tmp_path: Path, damage: str) -> None:
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
    await templates.sweep(lambda _: True)  # nothing is there yet
    for key, qemu in (("new", "10.0"), ("old", "9.2"), ("bad", "10.0")):
        await templates.ensure(key, Builder(key, qemu).build)
    (tmp_path / "bad/about.json").write_text("[]")
    for name in ("half.new", "half.gone"):
        (tmp_path / name).mkdir()
    await templates.sweep(lambda record: record.qemu == "10.0")
    assert {path.name for path in tmp_path.iterdir()} == {"new"}
