"""Images built for real: containers, overlays, Debian's archive."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from alveole.host.cgroup import Cgroups
from alveole.host.identity import CLAIMS, Identity, load_identity
from alveole.host.mount import mount_overlay, unmount
from alveole.image import build_cell
from alveole.image.node import NodeImages
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.image import ImageContent, Recipe

pytestmark = pytest.mark.root

RECIPES = Path(__file__).parents[2] / "recipes"
BUSYBOX: dict[str, Any] = {
    "base": "scratch",
    "files": [{"target": "/bin/busybox", "source": "/bin/busybox"}],
    "commands": [["/bin/busybox", "--install", "-s", "/bin"]],
}


class Node:
    """A node's image store, and what a test asks of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.identity = load_identity(root / "state", root / "run")
        self.images = NodeImages(root / "state/images", self.identity)
        self.said: list[str] = []

    async def build(
        self,
        recipe: dict[str, Any],
        base: ImageContent | None = None,
        *,
        directory: Path | None = None,
        cache: bool = True,
    ) -> ImageContent:
        self.said.clear()
        return await self.images.build(
            Recipe.model_validate(recipe), directory or self.root, base, use_cache=cache, progress=self.said.append
        )

    async def run(self, content: ImageContent, script: str) -> str:
        """What ``script`` prints in the image's files, by the host's root without any shift of ids."""
        async with self.mounted(content) as root:
            done = subprocess.run(
                ["/usr/sbin/chroot", root, "/bin/sh", "-c", script],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={"PATH": "/bin"},
            )
        return done.stdout.strip()

    @asynccontextmanager
    async def mounted(self, content: ImageContent) -> AsyncIterator[Path]:
        at = Path(tempfile.mkdtemp(dir=self.root))
        layers = self.images.layer_directories(content)
        await mount_overlay(at / "root", layers, at / "upper", at / "work", shift=None, scratch=at / "scratch")
        try:
            yield at / "root"
        finally:
            await unmount(at / "root")

    async def heard(self, line: str) -> None:
        """Wait until a build says so."""
        while line not in self.said:  # noqa: ASYNC110  (it says it to a list)
            await asyncio.sleep(0.02)

    def assert_nothing_left(self) -> None:
        assert not (self.identity.state / "build").exists()
        assert str(self.root) not in Path("/proc/self/mountinfo").read_text()
        cgroups = Cgroups()
        assert not [m for m in cgroups.layout.mounts if (m / self.identity.cgroup / "build").exists()]
        assert not cgroups.processes(self.identity.cgroup)
        assert not list((self.identity.state / "images/tmp").iterdir())


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that ids without rights on the host can pass."""
    directory = Path(tempfile.mkdtemp(prefix="alveole-build-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
async def node(root: Path) -> AsyncIterator[Node]:
    node = Node(root)
    await node.images.open()
    yield node
    node.assert_nothing_left()
    _forget(node.identity)


def _forget(identity: Identity) -> None:
    Cgroups().release(identity.cgroup)
    (CLAIMS / identity.id).unlink()


async def test_the_busybox_recipe_runs(node: Node) -> None:
    recipe = Recipe.model_validate(tomllib.loads((RECIPES / "busybox.toml").read_text()))
    content = await node.images.build(recipe, RECIPES, None, use_cache=True, progress=node.said.append)
    assert content.config.command == ("sh",)
    assert await node.run(content, "id -un && ls -ld /tmp | cut -c1-10 && echo a | sed s/a/b/") == "root\ndrwxrwxrwt\nb"


async def test_a_child_adds_changes_and_removes(node: Node) -> None:
    """Files with their ids and modes, a removed base file, a directory replaced, hard links, over a base image."""
    base = await node.build(
        BUSYBOX
        | {
            "commands": [
                *BUSYBOX["commands"],
                "mkdir -p /old /etc && echo 1 >/old/a && echo 1 >/etc/gone && echo 1 >/etc/kept",
            ],
            "env": {"A": "1"},
        }
    )
    site = node.root / "site"
    (site / "sub").mkdir(parents=True)
    (site / "sub/page").write_text("hello")
    (site / "link").symlink_to("sub/page")
    content = await node.build(
        {
            "base": "busybox",
            "files": [
                {"target": "/srv", "source": "site", "user": 33, "group": 34},
                {"target": "/etc/secret", "content": "s", "mode": "0400", "user": 1000},
            ],
            "commands": [
                "rm /etc/gone && rm -r /old && mkdir /old && echo 2 >/old/b",
                "echo x >/one && ln /one /two && chown 65535:7 /one && chmod 4755 /one && mkfifo /pipe",
            ],
            "env": {"B": "2"},
            "command": ["cat", "/srv/link"],
        },
        base,
    )
    assert content.layers[: len(base.layers)] == base.layers
    assert len(content.layers) == len(base.layers) + 3
    assert content.config.env[1:] == ("A=1", "B=2")
    assert await node.run(content, "cat /srv/link; echo; ls /old /etc") == "hello\n/etc:\nkept\nsecret\n\n/old:\nb"
    assert (
        await node.run(content, "stat -c '%a %u %g' /etc/secret /srv /srv/sub/page")
        == "400 1000 0\n755 33 34\n644 33 34"
    )
    assert await node.run(content, "stat -c '%a %u %g %h' /one /two") == "4755 65535 7 2\n4755 65535 7 2"
    assert await node.run(content, "stat -c %F /pipe") == "fifo"
    assert await node.run(base, "cat /etc/gone /old/a") == "1\n1"


async def test_files_go_through_the_links_of_the_image(node: Node) -> None:
    """A file for /lib/x must not hide the link /lib -> usr/lib, as that would take away everything behind it."""
    base = await node.build(BUSYBOX | {"commands": [*BUSYBOX["commands"], "mkdir -p /usr/lib && ln -s usr/lib /lib"]})
    content = await node.build({"base": "b", "files": [{"target": "/lib/x", "content": "y"}]}, base)
    assert await node.run(content, "readlink /lib; cat /usr/lib/x") == "usr/lib\ny"


async def test_steps_that_change_nothing_make_equal_layers(node: Node) -> None:
    """The kernel refuses to stack a layer on itself."""
    content = await node.build(BUSYBOX | {"commands": [*BUSYBOX["commands"], "true", ":", "echo 1 >/end"]})
    assert content.layers[2] == content.layers[3]
    assert await node.run(content, "cat /end") == "1"


async def test_what_did_not_change_is_not_made_again(node: Node) -> None:
    unique = BUSYBOX | {"commands": [*BUSYBOX["commands"], "cat /proc/sys/kernel/random/uuid >/id"]}
    first = await node.build(unique)
    assert "unchanged" not in node.said
    assert await node.build(unique) == first
    assert node.said.count("unchanged") == 3
    again = await node.build(unique, cache=False)
    assert again.layers[0] == first.layers[0]  # the same files gave the same bytes
    assert again.layers[2] != first.layers[2]


async def test_a_changed_file_is_noticed(node: Node) -> None:
    (node.root / "f").write_text("1")
    recipe = {"base": "scratch", "files": [{"target": "/f", "source": "f"}]}
    first = await node.build(recipe)
    os.utime(node.root / "f", (1, 1))
    assert await node.build(recipe) == first
    (node.root / "f").write_text("2")
    assert (await node.build(recipe)).layers != first.layers


async def test_layers_collected_since_are_made_again(node: Node) -> None:
    recipe = {"base": "scratch", "files": [{"target": "/f", "content": "1"}]}
    for directory in node.images.layer_directories(await node.build(recipe)):
        shutil.rmtree(directory.parent)
    assert (await node.images.has(await node.build(recipe))) is True


async def test_a_failing_command_says_why_and_leaves_nothing(node: Node) -> None:
    recipe = BUSYBOX | {"commands": [*BUSYBOX["commands"], "echo about to fail; sleep 1000 & echo no >&2; exit 7"]}
    with pytest.raises(AlveoleError) as caught:
        await node.build(recipe)
    assert caught.value.code is ErrorCode.INVALID
    assert caught.value.field == "commands.1"
    assert "exit code 7: about to fail\nno" in caught.value.message
    node.assert_nothing_left()


async def test_a_command_that_does_not_exist(node: Node) -> None:
    with pytest.raises(AlveoleError, match="/bin/nothing"):
        await node.build(BUSYBOX | {"commands": [["/bin/nothing"]]})


async def test_commands_without_anything_to_run_in(node: Node) -> None:
    with pytest.raises(AlveoleError, match="scratch"):
        await node.build({"base": "scratch", "commands": ["true"]})


async def test_a_base_that_is_not_here(node: Node) -> None:
    with pytest.raises(AlveoleError, match="pull it first"):
        await node.build({"base": "elsewhere"})


async def test_packages_need_apt_in_the_base(node: Node) -> None:
    base = await node.build(
        BUSYBOX | {"files": [*BUSYBOX["files"], {"target": "/etc/os-release", "content": "ID=busybox"}]}
    )
    with pytest.raises(AlveoleError, match="apt-get") as caught:
        await node.build({"base": "busybox", "packages": ["nano"]}, base)
    assert caught.value.field == "packages"


@pytest.mark.parametrize("source", ["link", "through/passwd", "missing", "pipe", "tree"])
async def test_sources_that_escape_or_are_no_files_are_refused(node: Node, source: str) -> None:
    directory = node.root / "recipe"
    (directory / "tree").mkdir(parents=True)
    (directory / "link").symlink_to("/etc/passwd")
    (directory / "through").symlink_to("../../../etc")
    os.mkfifo(directory / "pipe")
    os.mkfifo(directory / "tree/pipe")
    with pytest.raises(AlveoleError) as caught:
        await node.build({"base": "scratch", "files": [{"target": "/f", "source": source}]}, directory=directory)
    assert caught.value.code is ErrorCode.INVALID
    assert source in caught.value.message


async def test_commands_are_walled_in(node: Node) -> None:
    """No id, device, network or capability of the host; the recipe's environment and the resource limits only."""
    recipe = BUSYBOX | {
        "env": {"A": "b"},
        "commands": [
            *BUSYBOX["commands"],
            'test "$A" = b && test -z "$LC_ALL" && test $$ -lt 9',
            "cat /proc/self/uid_map && grep -v lo: /proc/net/dev | wc -l && grep CapBnd /proc/self/status",
            "! mount -t tmpfs none /etc && ! mknod /disk b 259 0 && ! echo 1 >/proc/sys/kernel/panic",
        ],
    }
    content = await node.build(recipe)
    base = node.identity.uid_base + (1 << 28) - 65536
    assert any(line.split() == ["0", str(base), "65536"] for line in node.said)
    assert "2" in node.said  # the two lines of headings
    assert "CapBnd:\t00000000800401fb" in node.said
    assert await node.run(content, "ls -A /") == "bin"  # mount points are none of the image's


async def test_a_command_that_never_ends_is_ended(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cell, "STEP_TIMEOUT_S", 1.0)
    with pytest.raises(AlveoleError) as caught:
        await node.build(BUSYBOX | {"commands": [*BUSYBOX["commands"], "trap '' TERM; sleep 1000 & sleep 1000"]})
    assert caught.value.code is ErrorCode.TIMEOUT
    node.assert_nothing_left()


async def test_a_cancelled_build_leaves_nothing(node: Node) -> None:
    task = asyncio.ensure_future(node.build(BUSYBOX | {"commands": [*BUSYBOX["commands"], "echo here; sleep 1000"]}))
    await asyncio.wait_for(node.heard("here"), timeout=30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    node.assert_nothing_left()


_ENDLESS_BUILD = """
import asyncio, sys
from pathlib import Path
from alveole.host.identity import load_identity
from alveole.image.node import NodeImages
from alveole.model.image import Recipe

async def main():
    root = Path(sys.argv[1])
    images = NodeImages(root / "state/images", load_identity(root / "state", root / "run"))
    await images.open()
    recipe = Recipe.model_validate({
        "base": "scratch",
        "files": [{"target": "/bin/busybox", "source": "/bin/busybox"}],
        "commands": [["/bin/busybox", "sh", "-c", "echo here; /bin/busybox sleep 1000"]],
    })
    await images.build(recipe, root, None, use_cache=True, progress=lambda line: print(line, flush=True))

asyncio.run(main())
"""


async def test_what_a_killed_daemon_left_is_removed_by_the_next(root: Path) -> None:
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", _ENDLESS_BUILD, str(root)], stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        for line in daemon.stdout:
            if line == "here\n":
                break
        daemon.send_signal(signal.SIGKILL)
    node = Node(root)
    assert Cgroups().processes(f"{node.identity.cgroup}/build")
    await node.images.open()
    node.assert_nothing_left()
    await node.build(BUSYBOX)
    _forget(node.identity)


async def test_two_debian_images_share_their_base(node: Node) -> None:
    """The nginx recipe serves, the debian recipe is a part of it, and the second build is quick."""
    said: list[str] = []
    contents = {}
    for name in ("debian", "nginx"):
        recipe = Recipe.model_validate(tomllib.loads((RECIPES / f"{name}.toml").read_text()))
        contents[name] = await node.images.build(recipe, RECIPES, None, use_cache=True, progress=said.append)
    assert contents["nginx"].layers[:1] == contents["debian"].layers
    health = contents["nginx"].config.health
    assert health is not None
    async with node.mounted(contents["nginx"]) as at:
        assert not (at / "etc/hostname").exists()
        assert not (at / "usr/sbin/policy-rc.d").exists()
        assert not list((at / "var/lib/apt/lists").glob("*Packages*"))
    script = 'nginx -g "daemon off;" & sleep 2; exec "$@"'
    probe = {"base": "nginx", "commands": [["/bin/bash", "-c", script, "bash", *health.command]]}
    assert (await node.build(probe, contents["nginx"])).layers[:-1] == contents["nginx"].layers
