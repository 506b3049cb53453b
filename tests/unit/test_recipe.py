"""Recipes: what is accepted, what is refused and how it is named, and that no document makes the check crash."""

import json
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.api.strict import validate
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.image import Recipe


def parse(text: str) -> Recipe:
    """As the command line and the API read it together."""
    return validate(Recipe, tomllib.loads(text))


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))

FULL = """
base = "debian:bookworm"
packages = ["nginx-light", "g++", "libc6:amd64", "redis=5:7.0.15-1~deb12u1"]
commands = ["echo one | cat", ["/bin/echo", "two"]]
env = { LANG = "C.UTF-8" }
command = ["nginx"]
ports = ["80/tcp"]

[[files]]
target = "/etc/motd"
content = ""
mode = "0600"

[health]
command = ["true"]
interval_s = 5
"""


def test_every_key_is_read() -> None:
    recipe = parse(FULL)
    assert recipe.suite == "bookworm"
    assert recipe.base_image == ""
    assert recipe.commands == (("/bin/sh", "-c", "echo one | cat"), ("/bin/echo", "two"))
    assert recipe.files[0].content == ""
    assert recipe.health is not None
    assert recipe.health.interval_s == 5


def test_a_recipe_survives_the_api() -> None:
    """The command line sends parsed TOML as JSON, the daemon stores what it validated and reads it again."""
    recipe = validate(Recipe, json.loads(json.dumps(tomllib.loads(FULL))))
    assert recipe == parse(FULL)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_own_recipes_are_valid(path: Path) -> None:
    parse(path.read_text())


def test_all_recipes_are_here() -> None:
    assert {path.stem for path in RECIPES} >= {"busybox", "debian", "debian-system", "nginx", "python", "redis"}


@pytest.mark.parametrize(
    ("base", "suite", "image"),
    [
        ("scratch", "", ""),
        ("debian:trixie", "trixie", ""),
        ("debian:12-slim", "", "debian:12-slim"),
        ("nginx", "", "nginx"),
        ("localhost:5000/a/b@sha256:00", "", "localhost:5000/a/b@sha256:00"),
    ],
)
def test_what_a_base_names(base: str, suite: str, image: str) -> None:
    recipe = Recipe(base=base)
    assert (recipe.suite, recipe.base_image) == (suite, image)


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ('base = "scratch"\npackags = []', "packags", "packages"),
        ('bse = "scratch"', "bse", "base"),
        ("packages = []", "base", "required"),
        ("base = 1", "base", "string"),
        ('base = "-o x"', "base", "pattern"),
        ('base = "debian:sid"\npackages = ["nano-"]', "packages[0]", "pattern"),
        ('base = "debian:sid"\npackages = ["-oDir::Etc=/"]', "packages[0]", "pattern"),
        ('base = "scratch"\npackages = ["nano"]', "", "not scratch"),
        ('base = "scratch"\ncommands = [[]]', "commands[0]", "at least 1"),
        ('base = "scratch"\ndisk_mib = 1024', "", "disk_mib needs a Debian base"),
        ('base = "nginx"\ndisk_mib = 1024', "", "not nginx"),
        ('base = "debian:sid"\ndisk_mib = 511', "disk_mib", "512"),
        ('base = "debian:sid"\ndisk_mib = 2_097_152', "disk_mib", "2097151"),
        ('base = "debian:sid"\ndisk_mib = 1024\nentrypoint = ["a"]', "", "entrypoint has no meaning"),
        ('base = "debian:sid"\ndisk_mib = 1024\ncommand = ["a"]', "", "command has no meaning"),
        ('base = "debian:sid"\ndisk_mib = 1024\nworkdir = "/"', "", "workdir has no meaning"),
        ('base = "debian:sid"\ndisk_mib = 1024\nuser = "a"', "", "user has no meaning"),
        ('base = "debian:sid"\ndisk_mib = 1024\nports = ["80/tcp"]', "", "ports has no meaning"),
        ('base = "debian:sid"\ndisk_mib = 1024\nlabels = { a = "b" }', "", "labels has no meaning"),
        ('base = "debian:sid"\ndisk_mib = 1024\nstop_signal = "TERM"', "", "stop_signal has no meaning"),
        ('base = "debian:sid"\ndisk_mib = 1024\n[health]\ncommand = ["a"]', "", "health has no meaning"),
        ('base = "scratch"\nworkdir = "srv"', "workdir", "pattern"),
        ('base = "scratch"\nuser = "a b"', "user", "pattern"),
        ('base = "scratch"\nports = ["0/tcp"]', "ports", "65535"),
        ('base = "scratch"\n[env]\n"A B" = "1"', "env", "A B"),
        ('base = "scratch"\n[health]\ncomand = ["a"]', "health.comand", "command"),
        ('base = "scratch"\n[[files]]\ntarget = "/a"\nconten = ""', "files[0].conten", "content"),
        ('base = "scratch"\n[[files]]\ntarget = "/a"', "files[0]", "either source or content"),
        ('base = "scratch"\n[[files]]\ntarget = "/a"\nsource = "b"\ncontent = ""', "files[0]", "either"),
        ('base = "scratch"\n[[files]]\ntarget = "/a/../b"\ncontent = ""', "files[0]", "'..'"),
        ('base = "scratch"\n[[files]]\ntarget = "/a"\nsource = "../b"', "files[0]", "'..'"),
        ('base = "scratch"\n[[files]]\ntarget = "//."\ncontent = ""', "files[0]", "root directory"),
        ('base = "scratch"\n[[files]]\ntarget = "/a"\ncontent = ""\nmode = "999"', "files[0].mode", "pattern"),
        ('base = "scratch"\n[[files]]\ntarget = "/a"\ncontent = ""\nuser = -1', "files[0].user", "greater"),
    ],
)
def test_what_is_wrong_is_named(text: str, field: str, said: str) -> None:
    with pytest.raises(AlveoleError) as caught:
        parse(text)
    assert caught.value.code is ErrorCode.INVALID
    assert caught.value.field == field
    assert said in str(caught.value)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)) | st.text(max_size=5), _VALUES))
def test_no_document_crashes_the_check(document: dict[str, object]) -> None:
    _recipe_or_invalid(lambda: validate(Recipe, {"base": "scratch"} | document))


def _recipe_or_invalid(make: Callable[[], Recipe]) -> None:
    with suppress_invalid():
        assert isinstance(make(), Recipe)


@contextmanager
def suppress_invalid() -> Iterator[None]:
    try:
        yield
    except AlveoleError as error:
        if error.code is not ErrorCode.INVALID:
            raise
