"""The daemon is killed before and after each recorded step, and each commit, of each operation.

Each time the next daemon brings the operation to its end or undoes it, nothing is doubled or left behind, and what
ran before goes on untouched.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.fault.actions import ACTIONS, ORDINARY, ORDINARY_COMMITS, ORDINARY_OF_MACHINES, Action, World
from tests.fault.conftest import MakeVictim, finish
from tests.fault.host import SETTLE_S, same_census
from tests.integration.daemon import until
from tests.registry import running_registry

pytestmark = pytest.mark.root
_COMMITS_AT_MOST = 12


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, small_tars: list[Path]) -> Iterator[str]:
    """An image in a registry."""
    directory = tmp_path_factory.mktemp("registry")
    with running_registry(directory) as registry:
        rootfs = f"tarball:{small_tars[0]}"
        target = f"docker://{registry.address}/pulled:latest"
        subprocess.run(["skopeo", "copy", "-q", "--dest-tls-verify=false", rootfs, target], check=True)
        yield f"{registry.address}/pulled"


class Worlds:
    """One world for all tests, made anew when a test has failed and left it in disorder."""

    def __init__(self, make: Callable[[], World]) -> None:
        self._make = make
        self._world: World | None = None

    def get(self) -> World:
        if self._world is None:
            self._world = self._make()
        return self._world

    def discard(self) -> None:
        if self._world is not None:
            self._world.victim.destroy()
        self._world = None

    def finish(self) -> None:
        try:
            if self._world is not None:
                finish(self._world.victim)
        finally:
            self.discard()


@pytest.fixture(scope="module")
def worlds(make_victim: MakeVictim, small_tars: list[Path], reference: str) -> Iterator[Worlds]:
    found = Worlds(lambda: World(make_victim(), small_tars, reference))
    yield found
    found.finish()


@pytest.fixture
def world(worlds: Worlds, request: pytest.FixtureRequest) -> Iterator[World]:
    failed_before = request.session.testsfailed
    found = worlds.get()
    yield found
    if request.session.testsfailed > failed_before:
        worlds.discard()


def settled(world: World, action: Action, operation: dict[str, Any] | None) -> None:
    """A daemon that starts after the kill brings everything to a good end."""
    victim = world.victim
    victim.settle()
    if operation is not None:
        ended = victim.outcome(operation)
        assert ended["state"] in action.states, (ended["state"], ended.get("error"))
    world.target.await_check()  # its record is that of the dead daemon for a moment
    world.check_standing()


def cleared(world: World) -> None:
    world.clear()
    same_census(world.victim, world.census)
    faults = world.victim.new_faults()
    assert not faults, "\n".join(faults)


def begin(world: World, action: Action, point: str) -> dict[str, Any] | None:
    """The operation, if the daemon lived long enough to tell of it."""
    action.prepare(world)
    world.victim.arm.write_text(point)
    with suppress(OSError):
        found = action.ask(world)
        return found if isinstance(found, dict) else None
    return None


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.name)
def test_points_are_known(world: World, action: Action) -> None:
    """So that a new step cannot be forgotten: each operation passes these points, and ends well when it is let."""
    action.prepare(world)
    world.victim.trace.write_text("")
    operation = action.ask(world)
    until(lambda: action.after(world), SETTLE_S, action.name)
    settled(world, action, operation if isinstance(operation, dict) else None)
    until(lambda: len(world.victim.points()) >= len(action.points), SETTLE_S, f"{action.points}")
    assert world.victim.points() == action.points
    cleared(world)


def marks(action: Action, point: str) -> list[pytest.MarkDecorator]:
    """Ordinary runs kill once between two steps, and leave out actions whose steps others have too."""
    first = point == action.points[0]
    ordinary = action.name in ORDINARY and (first or point.endswith(":after"))
    ordinary = ordinary or (action.name == "run a machine" and point in ORDINARY_OF_MACHINES)
    return [] if ordinary else [pytest.mark.slow]


POINTS = [
    pytest.param(action, point, id=f"{action.name}-{point}", marks=marks(action, point))
    for action in ACTIONS
    for point in action.points
]


@pytest.mark.parametrize(("action", "point"), POINTS)
def test_killed_at_a_step(world: World, action: Action, point: str) -> None:
    operation = begin(world, action, point)
    world.victim.await_death()
    world.serve_without_daemon()
    world.victim.start()
    settled(world, action, operation)
    until(lambda: action.after(world), SETTLE_S, f"{action.name} after a kill at {point}")
    cleared(world)


COMMITS = [
    pytest.param(
        action,
        when,
        id=f"{action.name}-{when}",
        marks=[] if action.name in ORDINARY_COMMITS and when == "after" else [pytest.mark.slow],
    )
    for action in ACTIONS
    for when in ("before", "after")
]


@pytest.mark.parametrize(("action", "when"), COMMITS)
def test_killed_at_a_commit(world: World, action: Action, when: str) -> None:
    """At each one that the action takes, until it is through without meeting its end."""
    for number in range(1, _COMMITS_AT_MOST):
        operation = begin(world, action, f"commit:{when}#{number}")
        killed = died(world, action, operation)
        if not killed:
            world.victim.arm.unlink()
        else:
            world.victim.await_death()
            world.victim.start()
        settled(world, action, operation)
        cleared(world)
        if not killed:
            assert number > 1, "no commit was met"
            return
    pytest.fail(f"{action.name} takes more than {_COMMITS_AT_MOST} commits")


def died(world: World, action: Action, operation: dict[str, Any] | None) -> bool:
    """Whether the daemon ended before the action was over."""

    def over() -> bool:
        if world.victim.ended:
            return True
        try:
            if operation is not None and world.victim.outcome(operation)["state"] == "running":
                return False
            return action.after(world)
        except (OSError, AssertionError, ValueError):  # it is dying as we ask
            return world.victim.ended

    until(over, SETTLE_S, f"the end of {action.name}")
    return world.victim.ended
