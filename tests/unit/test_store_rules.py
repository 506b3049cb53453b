"""The pure parts of the store."""

from hypothesis import given
from hypothesis import strategies as st

from alveole.store.base import KEPT_REVISIONS
from alveole.store.revision import COMPACTION_STEP, compaction_due, prefix_end

TEXT = st.text(st.sampled_from("a\x00\x7f\x80é\ud7ff\ue000\uffff\U00010000\U0010fffe\U0010ffff"), max_size=4)


@given(TEXT, TEXT)
def test_prefix_end_parts_exactly_the_keys_with_the_prefix(prefix: str, key: str) -> None:
    """In UTF-8 byte order, ``prefix <= key < end`` holds for keys with the prefix and for no others."""
    end = prefix_end(prefix)
    below_end = end is None or key.encode() < end.encode()
    assert (prefix.encode() <= key.encode() and below_end) == key.startswith(prefix)


@given(st.integers(0, 10 * KEPT_REVISIONS), st.integers(0, 10 * KEPT_REVISIONS))
def test_compaction_keeps_enough_and_does_not_let_history_grow(current: int, compacted: int) -> None:
    due = compaction_due(current, compacted)
    if due is None:
        assert current - compacted < KEPT_REVISIONS + COMPACTION_STEP
    else:
        assert due > compacted
        assert current - due >= KEPT_REVISIONS
