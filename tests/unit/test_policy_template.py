"""Which template a key means."""

import pytest

from alveole.model.error import AlveoleError, ErrorCode
from alveole.policy.template import find_template
from tests.fakes import FakeTemplates

POOL = FakeTemplates()
KNOWN = [POOL.add(key) for key in ("3f2a000000000000", "3f2b000000000000", "a000000000000000")]


@pytest.mark.parametrize(("key", "number"), [("3f2a", 0), ("3f2b000000000000", 1), ("a", 2)])
def test_the_beginning_is_enough_where_it_is_unique(key: str, number: int) -> None:
    assert find_template(KNOWN, key) is KNOWN[number]


@pytest.mark.parametrize("key", ["", "b", "3f2a0000000000000", "A"])
def test_what_is_none(key: str) -> None:
    with pytest.raises(AlveoleError, match="does not exist") as caught:
        find_template(KNOWN, key)
    assert caught.value.code is ErrorCode.NOT_FOUND


def test_what_may_be_several_names_them() -> None:
    with pytest.raises(AlveoleError, match="'3f2' is not unique: 3f2a000000000000, 3f2b000000000000") as caught:
        find_template(KNOWN, "3f2")
    assert caught.value.code is ErrorCode.CONFLICT
