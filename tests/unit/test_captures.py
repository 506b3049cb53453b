"""What a fork takes of a moment: memory and disk are of the same one, wherever a daemon died while it took them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from alveole.agent.captures import Captures
from alveole.agent.record import Paths
from alveole.model.instance import Origin
from alveole.runtime.base import Capability, Handle, Runtime
from alveole.volume.base import VolumeDriver

MOMENT, ORIGINAL = "0" * 12, "1" * 12
ORIGIN = Origin(instance="web", instance_id=ORIGINAL, node="node-1", moment=MOMENT)
HANDLE = cast("Handle", object())


class Host:
    """Runtime and volumes at once: each capture and the disk at that time bear its number. Raises where told to."""

    def __init__(self) -> None:
        self.captures = 0
        self.disks: dict[str, str] = {ORIGINAL: ""}
        self.dies_at = ""

    async def capture(self, _: Handle, directory: Path, still: Callable[[], Awaitable[None]], *, go_on: bool) -> Any:
        assert go_on
        self.captures += 1
        await asyncio.sleep(0.01)
        self.disks[ORIGINAL] = f"capture {self.captures}"
        (directory / "pages").write_text(f"capture {self.captures}")
        await still()

    capabilities = frozenset({Capability.MACHINE})

    async def copy_root_disk(self, source_id: str, instance_id: str, *, replace: bool = False) -> None:
        self._reach(f"before {instance_id}")
        if replace or instance_id not in self.disks:
            self.disks[instance_id] = self.disks[source_id]
        self._reach(f"after {instance_id}")

    async def remove_root_disk(self, instance_id: str) -> None:
        await asyncio.sleep(0.01)
        self.disks.pop(instance_id, None)

    def _reach(self, point: str) -> None:
        if point == self.dies_at:
            raise InterruptedError


async def take(host: Host, paths: Paths, captures: Captures, instance_id: str = "fork") -> tuple[str, str]:
    """(capture that its memory is of, capture that its disk is of)"""
    captures.running[ORIGINAL] = HANDLE
    volumes, runtime = cast("VolumeDriver", host), cast("Runtime", host)
    files = await captures.take(paths, volumes, runtime, ORIGIN, instance_id, ids_base=0, files=asyncio.Lock())
    return (files / "pages").read_text(), host.disks[instance_id]


@pytest.mark.parametrize("point", [f"before moment-{MOMENT}", f"after moment-{MOMENT}", "before fork", "after fork"])
async def test_memory_and_disk_are_of_one_moment(tmp_path: Path, point: str) -> None:
    host, paths = Host(), Paths(tmp_path / "state", tmp_path / "run")
    host.dies_at = point
    with pytest.raises(InterruptedError):
        await take(host, paths, Captures())
    host.dies_at = ""
    captures = Captures()
    await captures.sweep(paths, cast("VolumeDriver", host))  # as every daemon does when it starts
    assert await take(host, paths, captures) == (f"capture {host.captures}",) * 2


async def test_what_was_taken_is_not_taken_again(tmp_path: Path) -> None:
    """Not even after a restart, when the original may be no more."""
    host, paths = Host(), Paths(tmp_path / "state", tmp_path / "run")
    assert await take(host, paths, Captures()) == ("capture 1",) * 2
    captures = Captures()
    await captures.sweep(paths, cast("VolumeDriver", host))
    assert await take(host, paths, captures) == ("capture 1",) * 2
    assert host.captures == 1


async def test_forks_share_a_moment(tmp_path: Path) -> None:
    host, paths, captures = Host(), Paths(tmp_path / "state", tmp_path / "run"), Captures()
    found = {await take(host, paths, captures, f"fork-{number}") for number in range(3)}
    assert found == {("capture 1",) * 2}
    assert host.captures == 1


async def test_a_moment_stays_while_a_fork_of_it_is_still_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alveole.agent.captures.KEPT_S", 0.0)
    host, paths, captures = Host(), Paths(tmp_path / "state", tmp_path / "run"), Captures()
    await take(host, paths, captures)
    await captures.sweep(paths, cast("VolumeDriver", host), wanted={MOMENT})
    assert await take(host, paths, captures, "later") == ("capture 1",) * 2
    await captures.sweep(paths, cast("VolumeDriver", host), wanted={""})
    assert not list(paths.moments.iterdir())
    assert f"moment-{MOMENT}" not in host.disks


async def test_forks_that_come_while_their_moment_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is captured again, once."""
    monkeypatch.setattr("alveole.agent.captures.KEPT_S", 0.0)
    host, paths, captures = Host(), Paths(tmp_path / "state", tmp_path / "run"), Captures()
    await take(host, paths, captures)
    sweeping = asyncio.ensure_future(captures.sweep(paths, cast("VolumeDriver", host)))
    await asyncio.sleep(0)
    early = asyncio.ensure_future(take(host, paths, captures, "early"))
    await sweeping
    assert await take(host, paths, captures, "late") == ("capture 2",) * 2
    assert await early == ("capture 2",) * 2
