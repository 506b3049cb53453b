"""What changed between two moments, both told beside the same image."""

from typing import Any

from alveole.cli.diff import between


def change(kind: str, path: str, size_bytes: int = 0) -> dict[str, Any]:
    return {"kind": kind, "path": path, "mode": 0o100644 if kind != "D" else 0, "size_bytes": size_bytes}


def lines(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    found = between({"changes": before}, {"changes": after, "complete": True})
    assert found["complete"]
    return [f"{item['kind']} {item['path']}" for item in found["changes"]]


def test_what_is_equal_is_not_told() -> None:
    assert lines([change("A", "/a"), change("D", "/d")], [change("A", "/a"), change("D", "/d")]) == []


def test_added_changed_and_deleted() -> None:
    before = [change("A", "/grew", 1), change("A", "/went"), change("C", "/config", 1), change("C", "/removed")]
    after = [change("A", "/came"), change("A", "/grew", 2), change("C", "/config", 2), change("D", "/removed")]
    assert lines(before, after) == ["A /came", "C /config", "C /grew", "D /removed", "D /went"]


def test_what_became_again_as_the_image_has_it() -> None:
    assert lines([change("C", "/edited"), change("D", "/deleted")], []) == ["A /deleted", "C /edited"]
    assert lines([], [change("C", "/edited"), change("D", "/deleted")]) == ["D /deleted", "C /edited"][::1]


def test_a_part_is_told_as_such() -> None:
    assert not between({"changes": [], "complete": False}, {"changes": []})["complete"]
