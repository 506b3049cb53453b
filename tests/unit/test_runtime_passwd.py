"""Who a user of an image is, and that an image's files cannot lead out of it."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.passwd import resolve_user

PASSWD = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/var/www:/bin/sh\n123:x:7:8::/seven:\nbroken:x:a:b::/:\n"
GROUP = "root:x:0:\nweb:x:34:\ndisk:x:6:web,other\nvideo:x:44:web\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    return root


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (":", (0, 0, (), "/root")),
        ("", (0, 0, (), "/root")),
        ("root", (0, 0, (), "/root")),
        ("web", (33, 34, (6, 44), "/var/www")),
        ("33", (33, 34, (6, 44), "/var/www")),
        ("web:disk", (33, 6, (), "/var/www")),
        ("web:99", (33, 99, (), "/var/www")),
        ("1000", (1000, 0, (), "/")),
        ("1000:1001", (1000, 1001, (), "/")),
        ("123", (7, 8, (), "/seven")),
    ],
)
def test_names_and_numbers(root: Path, user: str, expected: tuple[object, ...]) -> None:
    assert tuple(resolve_user(root, user)) == expected


@pytest.mark.parametrize("user", ["nobody", "web:nogroup", "broken", "-1", "99999999999", "٣", "4294967295"])
def test_what_the_image_does_not_know_is_invalid(root: Path, user: str) -> None:
    with pytest.raises(AlveoleError) as caught:
        resolve_user(root, user)
    assert caught.value.code == ErrorCode.INVALID


def test_an_image_without_files_has_numbers_only(tmp_path: Path) -> None:
    assert resolve_user(tmp_path, "5:6")[:3] == (5, 6, ())
    with pytest.raises(AlveoleError):
        resolve_user(tmp_path, "web")


@pytest.mark.parametrize("target", ["/outside/passwd", "../../outside/passwd", "../" * 20 + "outside/passwd"])
def test_symlinks_do_not_lead_out(root: Path, target: str) -> None:
    """Not to the host's file of that path either: here one that knows the user."""
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("thief:x:66:66::/:\n")
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to(target if target.startswith("..") else f"{root.parent}{target}")
    with pytest.raises(AlveoleError):
        resolve_user(root, "thief")


def test_an_absolute_symlink_means_inside(root: Path) -> None:
    (root / "etc/passwd").rename(root / "etc/users")
    (root / "etc/passwd").symlink_to("/etc/users")
    assert resolve_user(root, "web").uid == 33


def test_a_linked_directory_does_not_lead_out(root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("thief:x:66:66::/:\n")
    (root / "etc").rename(root / "old")
    (root / "etc").symlink_to(outside)
    with pytest.raises(AlveoleError):
        resolve_user(root, "thief")


@pytest.mark.parametrize("kind", ["pipe", "directory", "loop"])
def test_what_is_no_file_is_no_file(root: Path, kind: str) -> None:
    """A named pipe would make a plain reader wait for ever."""
    path = root / "etc/passwd"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("passwd")
    assert resolve_user(root, "0").uid == 0


def test_a_huge_file_is_read_in_part(root: Path) -> None:
    with (root / "etc/passwd").open("a") as file:
        file.truncate(1 << 30)
        file.seek(1 << 30)
        file.write("\nlate:x:1:1::/:\n")
    assert resolve_user(root, "web").uid == 33
    with pytest.raises(AlveoleError):
        resolve_user(root, "late")


@given(passwd=st.binary(max_size=300), user=st.text(max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_breaks_it(root: Path, passwd: bytes, user: str) -> None:
    (root / "etc/passwd").write_bytes(passwd)
    with suppress(AlveoleError):
        assert 0 <= resolve_user(root, user).uid < 2**31
