"""Who "user[:group]" is in an image, by the image's own /etc/passwd and /etc/group. Their contents are hostile."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from alveole.host.inside import read_inside
from alveole.model.error import invalid

_LIMIT_BYTES = 256 << 10  # read and searched within milliseconds
_HIGHEST_ID = 2**31 - 1
_GROUPS_LIMIT = 64


class Account(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


class _User(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


class _Group(NamedTuple):
    name: str
    gid: int
    members: frozenset[str]


def resolve_user(root: Path, user: str) -> Account:
    """The account of ``user``: a name or number, perhaps with ":group"; empty is root.

    A number need not be known to the image. Supplementary groups are the image's, unless a group was given.
    Raises AlveoleError(INVALID) for a name the image does not know or an id out of range.
    """
    name, _, group = user.partition(":")
    name = name or "0"
    known = _find_user(root, name)
    if known is None and not _is_id(name):
        raise invalid(f"user {name!r} not found in the image's /etc/passwd", hint="use a number or another name")
    uid = known.uid if known else int(name)
    gid = _find_group(root, group) if group else (known.gid if known else 0)
    groups = () if group or known is None else _supplementary(root, known)
    return Account(uid, gid, groups, known.home if known else "/")


def _find_user(root: Path, name: str) -> _User | None:
    """By name first, as a name may consist of digits."""
    users = list(_users(root))
    by_name = next((user for user in users if user.name == name), None)
    return by_name or next((user for user in users if _is_id(name) and user.uid == int(name)), None)


def _find_group(root: Path, name: str) -> int:
    by_name = next((group.gid for group in _groups(root) if group.name == name), None)
    if by_name is not None:
        return by_name
    if not _is_id(name):
        raise invalid(f"group {name!r} not found in the image's /etc/group", hint="use a number or another name")
    return int(name)


def _supplementary(root: Path, user: _User) -> tuple[int, ...]:
    found = {group.gid for group in _groups(root) if user.name in group.members}
    return tuple(sorted(found))[:_GROUPS_LIMIT]


def _users(root: Path) -> Iterator[_User]:
    for fields in _records(root, "etc/passwd", 7):
        if _is_id(fields[2]) and _is_id(fields[3]):
            yield _User(fields[0], int(fields[2]), int(fields[3]), fields[5] or "/")


def _groups(root: Path) -> Iterator[_Group]:
    for fields in _records(root, "etc/group", 4):
        if _is_id(fields[2]):
            yield _Group(fields[0], int(fields[2]), frozenset(fields[3].split(",")))


def _records(root: Path, path: str, width: int) -> Iterator[list[str]]:
    """Lines of exactly ``width`` fields; all others are skipped, as by the C library."""
    text = (read_inside(root, path, _LIMIT_BYTES) or b"").decode(errors="replace")
    for line in text.split("\n"):
        fields = line.split(":")
        if len(fields) == width and fields[0] and not line.startswith("#"):
            yield fields


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _HIGHEST_ID
