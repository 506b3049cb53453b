"""The pure parts of building images: apt sources, keys of steps, configuration, links within layers."""

import json
import struct
from pathlib import Path

import pytest

from alveole.image.build_cache import BuildCache, step_key
from alveole.image.build_config import image_config
from alveole.image.debian import ANY_SUITE, AptSource, debian_lines, parse_sources
from alveole.image.layer_path import resolve
from alveole.image.layer_tar import kept_attributes
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.image import ImageConfig, Recipe

LAYER = "sha256:" + "a" * 64

DEB822 = """\
# the archive
Types: deb deb-src
URIs: http://mirror.example/debian http://other.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
"""

ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example/apt bookworm main
deb-src http://mirror.example/debian bookworm main
deb http://old.example/debian bookworm main # and a comment
"""


def test_both_forms_of_sources_are_read() -> None:
    debian = "/usr/share/keyrings/debian-archive-keyring.gpg"
    suites = ("bookworm", "bookworm-updates")
    assert parse_sources({"a.sources": DEB822, "b.list": ONE_LINE}) == (
        AptSource("http://mirror.example/debian", suites, ("main", "contrib"), debian),
        AptSource("http://other.example/debian", suites, ("main", "contrib"), debian),
        AptSource("http://security.example/debian-security", ("bookworm-security",), ("main",)),
        AptSource("https://vendor.example/apt", ("bookworm",), ("main",), "/usr/share/keyrings/vendor.gpg"),
        AptSource("http://old.example/debian", ("bookworm",), ("main",)),
    )


def test_only_debians_own_archives_are_used() -> None:
    lines = debian_lines(parse_sources({"a.sources": DEB822, "b.list": ONE_LINE}), "bookworm", "trixie")
    keyring = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    assert lines == (
        f"deb {keyring} http://mirror.example/debian trixie main",
        f"deb {keyring} http://mirror.example/debian trixie-updates main",
        f"deb {keyring} http://other.example/debian trixie main",
        f"deb {keyring} http://other.example/debian trixie-updates main",
        "deb http://security.example/debian-security trixie-security main",
        "deb http://old.example/debian trixie main",
    )


def test_a_rolling_suite_has_no_updates_and_no_security() -> None:
    source = AptSource("http://m/debian", ("bookworm", "bookworm-updates", "bookworm-security"), ("main",))
    assert debian_lines([source], "bookworm", "sid") == ("deb http://m/debian sid main",)
    assert len(debian_lines([source], "bookworm", ANY_SUITE)) == 3


@pytest.mark.parametrize(
    ("uri", "host_suite", "said"),
    [("http://user:secret@m/debian", "bookworm", "password"), ("http://m/debian", "noble", "no Debian archive")],
)
def test_unusable_sources_are_refused(uri: str, host_suite: str, said: str) -> None:
    """A password would end up in the image; and the message must not repeat it."""
    with pytest.raises(AlveoleError, match=said) as caught:
        debian_lines([AptSource(uri, ("bookworm",), ("main",))], host_suite, "bookworm")
    assert caught.value.code is ErrorCode.UNSUPPORTED
    assert "secret" not in str(caught.value)


def test_keys_are_stable_and_tell_steps_apart() -> None:
    """The literal guards against a change that would make every user build everything again unawares."""
    assert step_key([LAYER], "command", ("a",)).startswith("df8faba93022")
    keys = {
        step_key([LAYER], "command", ("a", "b")),
        step_key([LAYER], "command", ("a b",)),
        step_key([LAYER], "packages", ("a", "b")),
        step_key([], "command", ("a", "b")),
        step_key([LAYER, LAYER], "command", ("a", "b")),
    }
    assert len(keys) == 5


def test_the_cache_believes_only_in_layers_that_are_here(tmp_path: Path) -> None:
    present = {LAYER}
    cache = BuildCache(tmp_path / "cache", present.__contains__)
    key = step_key([], "x")
    assert cache.layer(key) == ""
    cache.remember(key, LAYER)
    assert cache.layer(key) == LAYER
    present.clear()
    assert cache.layer(key) == ""
    cache.prune()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("text", ["", "sha256:", "../../etc", "\n" + LAYER])
def test_a_damaged_record_is_no_record(tmp_path: Path, text: str) -> None:
    """After a power cut it may be empty."""
    cache = BuildCache(tmp_path, lambda _: True)
    key = step_key([], "x")
    (tmp_path / key).write_text(text)
    (tmp_path / "new").write_text(LAYER)
    assert cache.layer(key) == ""
    cache.prune()
    assert not list(tmp_path.iterdir())


BASE = ImageConfig(
    entrypoint=("/entry",),
    command=("serve",),
    env=("PATH=/opt", "A=1", "B=x=y"),
    workdir="/srv",
    user="app",
    ports=("80/tcp",),
    labels={"a": "1", "b": "2"},
    stop_signal="SIGINT",
)


def test_what_a_recipe_leaves_out_is_as_in_its_base() -> None:
    assert image_config(Recipe(base="x"), BASE) == BASE


def test_a_recipe_wins_over_its_base() -> None:
    recipe = Recipe(
        base="x", env={"A": "2", "C": ""}, command=("run",), user="root", ports=("80/tcp", "53/udp"), labels={"b": "3"}
    )
    config = image_config(recipe, BASE)
    assert config.env == ("PATH=/opt", "A=2", "B=x=y", "C=")
    assert (config.entrypoint, config.command) == (("/entry",), ("run",))
    assert (config.user, config.workdir) == ("root", "/srv")
    assert config.ports == ("80/tcp", "53/udp")
    assert dict(config.labels) == {"a": "1", "b": "3"}


def test_a_new_entrypoint_drops_the_old_ones_arguments() -> None:
    config = image_config(Recipe(base="x", entrypoint=("/mine",)), BASE)
    assert (config.entrypoint, config.command) == (("/mine",), ())


def test_an_image_from_nothing_has_a_path() -> None:
    config = image_config(Recipe(base="scratch"), ImageConfig())
    assert config.env[0].startswith("PATH=")


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """Lower: /bin -> usr/bin, /up -> ../../.., /abs -> /usr/bin, /loop -> loop. Upper: /abs is a directory."""
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    (lower / "usr/bin").mkdir(parents=True)
    for name, target in {"bin": "usr/bin", "up": "../../../etc", "abs": "/usr/bin", "loop": "loop"}.items():
        (lower / name).symlink_to(target)
    (upper / "abs").mkdir(parents=True)
    (upper / "out").symlink_to("/")
    (lower / "usr/bin/sh").symlink_to("/bin/dash")
    return [lower, upper]


@pytest.mark.parametrize(
    ("target", "last", "leads_to"),
    [
        ("/bin/tool", False, "usr/bin/tool"),
        ("/bin", True, "usr/bin"),
        ("/bin", False, "bin"),
        ("/up/passwd", False, "etc/passwd"),
        ("/abs/tool", False, "abs/tool"),
        ("/out/usr/bin/x", False, "usr/bin/x"),
        ("/bin/sh", True, "usr/bin/dash"),
        ("/new/dir/file", False, "new/dir/file"),
    ],
)
def test_links_are_followed_within_the_image(layers: list[Path], target: str, last: bool, leads_to: str) -> None:
    assert resolve(target, layers, last=last) == leads_to


def test_a_loop_of_links_ends(layers: list[Path]) -> None:
    with pytest.raises(OSError, match="symbolic links"):
        resolve("/loop/x", layers, last=False)


def test_looking_up_a_path_never_follows_a_link_of_the_host(tmp_path: Path) -> None:
    """A lower layer's link that an upper directory hides must not lead to the host's files."""
    lower, upper, host = tmp_path / "lower", tmp_path / "upper", tmp_path / "host"
    for directory in (lower, upper / "a", host):
        directory.mkdir(parents=True)
    (host / "b").symlink_to("/secret")
    (lower / "a").symlink_to(host)
    assert resolve("/a/b/c", [lower, upper], last=False) == "a/b/c"


def test_recipe_files_are_json_for_the_tar_writer() -> None:
    recipe = Recipe.model_validate({"base": "scratch", "files": [{"target": "/a", "content": "x"}]})
    dumped = json.loads(json.dumps([file.model_dump(mode="json") for file in recipe.files]))
    assert dumped == [{"target": "/a", "source": "", "content": "x", "mode": "", "user": 0, "group": 0}]


def test_attributes_of_overlayfs_and_of_the_builds_namespace_stay_out_of_the_layer() -> None:
    """File capabilities set in a user namespace name its root (revision 3); elsewhere they would mean nothing."""
    bits = struct.pack("<4I", 1 << 10, 0, 0, 0)
    in_namespace = struct.pack("<I", 0x03000001) + bits + struct.pack("<I", 268435456)
    attributes = {
        "user.mine": b"\xff",
        "user.overlay.origin": b"",
        "trusted.overlay.opaque": b"y",
        "security.selinux": b"x",
        "security.capability": in_namespace,
    }
    assert dict(kept_attributes(attributes)) == {
        "user.mine": b"\xff",
        "security.capability": struct.pack("<I", 0x02000001) + bits,
    }
