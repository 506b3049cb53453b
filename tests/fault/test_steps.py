"""The daemon is killed before and after each recorded step, and each commit, of each operation.

Each time the next daemon brings the operation to its end or undoes it, nothing is doubled or left behind, and what
ran before goes on untouched.
"""

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fault.conftest import MakeVictim, finish
from tests.fault.host import KEPT, SETTLE_S, Service, Victim, fill, same_census, send, warm
from tests.integration.daemon import until
from tests.registry import running_registry

pytestmark = pytest.mark.root
_MAKE = ("image", "network", "root", "mounts", "create")
_UNMAKE = ("delete", "unmount", "release", "detach")
_COMMITS_AT_MOST = 12


class World:
    """A daemon that keeps two services running, and a third that the tests act on."""

    def __init__(self, victim: Victim, tars: list[Path], reference: str) -> None:
        self.victim, self.tars, self.reference = victim, tars, reference
        self.standing = [Service(victim, "stands", volume="still"), Service(victim, "boxed", "sandbox", "still")]
        self.target = Service(victim, "target")
        fill(victim, "still")
        fill(victim, "data")
        for service in self.standing:
            service.run()
        self.pids = [service.pid for service in self.standing]
        self.census = victim.census()
        until(self._steady, SETTLE_S, "a steady state")

    def _steady(self) -> bool:
        before, self.census = self.census, self.victim.census()
        return before == self.census

    def check_standing(self) -> None:
        for service, pid in zip(self.standing, self.pids, strict=True):
            service.check()
            assert service.pid == pid

    def serve_without_daemon(self) -> None:
        for service in self.standing:
            service.await_answer("127.0.0.1", service.port)

    def clear(self) -> None:
        """Back to what it was in the beginning."""
        victim = self.victim
        for kind, kept in (
            ("instances", {"stands", "boxed"}),
            ("snapshots", set()),
            ("volumes", {"still", "data"}),
            ("networks", {"default"}),
        ):
            for name in set(victim.names(kind)) - kept:
                victim.done("DELETE", f"/v1/{kind}/{name}?force=true" if kind == "instances" else f"/v1/{kind}/{name}")
        for image in victim.items("images"):
            if not image["name"].endswith("/busybox:latest"):
                victim.done("DELETE", f"/v1/images/{image['name']}")

    def import_body(self, name: str, tar: int = 0) -> dict[str, Any]:
        return {"name": name, "path": str(self.tars[tar]), "format": "rootfs"}


Ask = Callable[[World], Any]


ORDINARY = frozenset(
    [
        *("run", "run a sandbox", "run without its program", "stop", "rm -f", "end and begin again"),
        *("fork", "sleep", "snapshot create", "snapshot restore"),
        *("volume create", "volume rm", "image import", "image pull", "image build", "image rm"),
    ]
)
# Those at which a machine is something else than a container.
ORDINARY_OF_MACHINES = frozenset(["start:root:after", "start:create:after", "start:start:after"])
ORDINARY_COMMITS = frozenset(["run", "rm -f", "volume create", "volume rm", "image import", "network rm"])


@dataclass(frozen=True)
class Action:
    """``ask`` begins it; ``states`` are those that its operation may end in; ``after`` tells whether all is well.

    A step that fails is marked: there is no point after it.
    """

    name: str
    steps: tuple[str, ...]
    ask: Ask
    prepare: Ask = field(default=lambda _: None)
    after: Callable[[World], bool] = field(default=lambda _: True)
    states: frozenset[str] = frozenset({"done"})

    @property
    def points(self) -> list[str]:
        pairs = ((f"{step}:before", f"{step}:after") for step in self.steps)
        return [point.replace("!", "") for pair in pairs for point in pair if not point.endswith("!:after")]


def steps(verb: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{verb}:{name}" for name in names)


def ask(method: str, path: str, body: Any = None) -> Ask:
    return lambda world: world.victim.ask(method, path, body)


def run(isolation: str = "container", **changes: Any) -> Ask:
    def begin(world: World) -> Any:
        world.target = Service(world.victim, "target", isolation)
        return world.victim.ask("POST", "/v1/instances", world.target.body(**changes))

    return begin


def have(isolation: str = "container", *, stopped: bool = False, asleep: bool = False, **changes: Any) -> Ask:
    def prepare(world: World) -> None:
        if isolation == "vm":
            warm_world(world)
        world.victim.outcome(run(isolation, **changes)(world))
        if stopped:
            world.victim.done("POST", "/v1/instances/target/stop", {"grace_s": 0})
        if asleep:
            world.victim.done("POST", "/v1/instances/target/sleep", {})

    return prepare


def phase(wanted: str) -> Callable[[World], bool]:
    def check(world: World) -> bool:
        record = world.target.record()
        return (record["status"]["phase"] if record else "gone") == wanted

    return check


def named(plural: str, name: str, *, there: bool) -> Callable[[World], bool]:
    return lambda world: any(name in found for found in world.victim.names(plural)) == there


def warm_world(world: World) -> None:
    """Machines go on from a template; it is made once."""
    if not any((world.victim.state / "qemu/templates").glob("*")):
        warm(world.victim)
        world.census = world.victim.census()


def make_volume(world: World) -> None:
    world.victim.done("POST", "/v1/volumes", {"name": "new", "size_bytes": 16 << 20})


def make_network(world: World) -> None:
    world.victim.done("POST", "/v1/networks", {"name": "new"})


def make_image(world: World) -> None:
    world.victim.done("POST", "/v1/images/import", world.import_body("new"))


def have_snapshot(isolation: str = "container", *, memory: bool = False, **changes: Any) -> Ask:
    def prepare(world: World) -> None:
        have(isolation, **changes)(world)
        world.victim.done("POST", "/v1/snapshots", {"instance": "target", "name": "kept", "memory": memory})

    return prepare


def build_body() -> dict[str, Any]:
    files = [{"target": "/bin/busybox", "source": "/bin/busybox", "mode": "0755"}]
    commands = [["/bin/busybox", "touch", "/made"]]
    return {"name": "new", "directory": "/", "recipe": {"base": "scratch", "files": files, "commands": commands}}


def end_process(world: World) -> None:
    send(world.target.pid or 0, signal.SIGKILL)


# What is kept of a machine does not include volumes.
_SERVE = f"mkdir -p /d; printf {KEPT} > /d/{KEPT}; exec httpd -f -p 80 -h /d"
_ALONE: dict[str, Any] = {"mounts": [], "command": ["sh", "-c", _SERVE]}
_STOP = (*steps("stop", "signal", "kill"), *steps("stop", *_UNMAKE))
_START = steps("start", *_MAKE, "start")
_REMOVE = (*steps("remove", *_UNMAKE[:3]), "remove:files")
_FAILED = frozenset({"failed"})
ACTIONS = (
    Action("run", _START, run(), after=phase("running")),
    Action("run a sandbox", _START, run("sandbox"), after=phase("running")),
    Action("run a machine", _START, run("vm"), warm_world, after=phase("running")),
    Action(
        "run without its bind",
        (*steps("start", *_MAKE[:3], "mounts!", *_UNMAKE), *_REMOVE),
        run(mounts=[{"kind": "bind", "source": "/nonexistent", "target": "/b"}]),
        after=phase("gone"),
        states=_FAILED,
    ),
    Action(
        "run without its program",
        (*steps("start", *_MAKE[:4], "create!", *_UNMAKE), *_REMOVE),
        run(command=["nonexistent"]),
        after=phase("gone"),
        states=_FAILED,
    ),
    Action("stop", _STOP, ask("POST", "/v1/instances/target/stop", {"grace_s": 0.2}), have(), phase("exited")),
    Action(
        "stop a sandbox",
        steps("stop", "signal", *_UNMAKE),
        ask("POST", "/v1/instances/target/stop", {"grace_s": 0.2}),
        have("sandbox"),
        phase("exited"),
    ),
    Action(
        "stop a machine",
        _STOP,
        ask("POST", "/v1/instances/target/stop", {"grace_s": 0.2}),
        have("vm"),
        phase("exited"),
    ),
    Action("start", _START, ask("POST", "/v1/instances/target/start", {}), have(stopped=True), phase("running")),
    Action(
        "restart",
        (*steps("stop", "kill", "delete"), *_START),
        ask("POST", "/v1/instances/target/restart", {"grace_s": 0}),
        have(),
        phase("running"),
    ),
    Action("rm", _REMOVE, ask("DELETE", "/v1/instances/target"), have(stopped=True), phase("gone")),
    Action(
        "rm -f",
        (*steps("stop", "kill", *_UNMAKE), *_REMOVE),
        ask("DELETE", "/v1/instances/target?force=true"),
        have(),
        phase("gone"),
    ),
    Action(
        "rm -f a machine",
        (*steps("stop", "kill", *_UNMAKE), *_REMOVE),
        ask("DELETE", "/v1/instances/target?force=true"),
        have("vm"),
        phase("gone"),
    ),
    Action(
        "fork",
        steps("start", "image", "network", "capture", "root", "mounts", "create", "start"),
        ask("POST", "/v1/instances/target/fork", {"name": "twin"}),
        have("vm", **_ALONE),
        lambda world: (
            [i["status"]["phase"] for i in world.victim.items("instances") if i["name"] == "twin"] == ["running"]
        ),
    ),
    Action(
        "fork paused",
        steps("prepare", "capture"),
        ask("POST", "/v1/instances/target/fork", {"name": "twin", "paused": True}),
        have("vm", **_ALONE),
        lambda world: (
            [i["status"]["phase"] for i in world.victim.items("instances") if i["name"] == "twin"] == ["asleep"]
        ),
    ),
    Action(
        "sleep",
        (*steps("sleep", "capture"), *steps("sleep", *_UNMAKE)),
        ask("POST", "/v1/instances/target/sleep", {}),
        have("vm", **_ALONE),
        phase("asleep"),
    ),
    Action(
        "wake",
        _START,
        ask("POST", "/v1/instances/target/start", {}),
        have("vm", asleep=True, **_ALONE),
        phase("running"),
    ),
    Action(
        "recreate",
        (*steps("stop", "kill", "delete"), *steps("start", *_MAKE[:2], "renew", *_MAKE[2:], "start")),
        ask("POST", "/v1/instances/target/recreate", {}),
        have(),
        phase("running"),
    ),
    Action(
        "snapshot create",
        steps("snapshot.create", "pause", "copy", "keep"),
        ask("POST", "/v1/snapshots", {"instance": "target", "name": "kept"}),
        have(),
        named("snapshots", "kept", there=True),
    ),
    Action(
        "snapshot create with memory",
        steps("snapshot.create", "capture", "keep"),
        ask("POST", "/v1/snapshots", {"instance": "target", "name": "kept", "memory": True}),
        have("vm", **_ALONE),
        named("snapshots", "kept", there=True),
    ),
    Action(
        "snapshot rm",
        steps("snapshot.rm", "rm"),
        ask("DELETE", "/v1/snapshots/kept"),
        have_snapshot(),
        named("snapshots", "kept", there=False),
    ),
    Action(
        "snapshot restore",
        (*steps("stop", "kill", "delete"), *steps("start", *_MAKE[:2], "renew", *_MAKE[2:], "start")),
        ask("POST", "/v1/snapshots/kept/restore", {}),
        have_snapshot(),
        phase("running"),
    ),
    Action(
        "snapshot restore with memory",
        (*steps("stop", "kill", "delete"), *steps("start", *_MAKE[:2], "renew", *_MAKE[2:], "start")),
        ask("POST", "/v1/snapshots/kept/restore", {}),
        have_snapshot("vm", memory=True, **_ALONE),
        phase("running"),
    ),
    Action(
        "end and begin again",
        (*steps("end", "delete"), *_START),
        end_process,
        have(restart={"policy": "always"}),
        phase("running"),
    ),
    Action("end", steps("end", *_UNMAKE), end_process, have(), phase("exited")),
    Action(
        "volume create",
        steps("volume.create", "create"),
        ask("POST", "/v1/volumes", {"name": "new", "size_bytes": 16 << 20}),
        after=named("volumes", "new", there=True),
    ),
    Action(
        "volume rm",
        steps("volume.rm", "rm"),
        ask("DELETE", "/v1/volumes/new"),
        make_volume,
        named("volumes", "new", there=False),
    ),
    Action(
        "image import",
        steps("image.import", "import"),
        lambda world: world.victim.ask("POST", "/v1/images/import", world.import_body("new")),
        after=named("images", "/new:", there=True),
    ),
    Action(
        "image pull",
        steps("image.pull", "pull"),
        lambda world: world.victim.ask("POST", "/v1/images/pull", {"reference": world.reference, "tls_verify": False}),
        after=named("images", "pulled", there=True),
    ),
    Action(
        "image build",
        steps("image.build", "build"),
        lambda world: world.victim.ask("POST", "/v1/images/build", build_body()),
        after=named("images", "/new:", there=True),
    ),
    Action(
        "image rm",
        steps("image.rm", "rm"),
        ask("DELETE", "/v1/images/new"),
        make_image,
        named("images", "/new:", there=False),
    ),
    Action(
        "network create",
        (),
        ask("POST", "/v1/networks", {"name": "new"}),
        after=named("networks", "new", there=True),
    ),
    Action("network rm", (), ask("DELETE", "/v1/networks/new"), make_network, named("networks", "new", there=False)),
)


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
