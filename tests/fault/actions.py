"""Operations that the fault tests carry out, the steps that each has, and the world that they act on."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fault.host import KEPT, SETTLE_S, Service, Victim, fill, send, warm
from tests.integration.daemon import until

_MAKE = ("image", "network", "root", "mounts", "create")
_UNMAKE = ("delete", "unmount", "release", "detach")


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


def remove_template(world: World) -> Any:
    return world.victim.ask("DELETE", f"/v1/templates/{world.victim.items('templates')[0]['key']}")


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
        "template rm",
        steps("template.rm", "rm"),
        remove_template,
        warm_world,
        lambda world: not world.victim.items("templates"),
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
