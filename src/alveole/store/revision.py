"""The arithmetic of keys and revisions that all drivers share. Pure."""

from alveole.model.error import AlveoleError, ErrorCode, invalid
from alveole.store.base import KEPT_REVISIONS, Compare, KeyValue, Put

FIRST_REVISION = 1  # of an empty store, as in etcd: 0 stays free to mean "does not exist"
COMPACTION_STEP = 1000  # revisions forgotten at a time, so that no single write pays for many


def holds(compare: Compare, found: KeyValue | None) -> bool:
    actual: int = getattr(found, compare.target) if found else 0
    return actual == compare.value


def written(put: Put, before: KeyValue | None, revision: int) -> KeyValue:
    return KeyValue(
        key=put.key,
        value=put.value,
        create_revision=before.create_revision if before else revision,
        mod_revision=revision,
        version=before.version + 1 if before else 1,
        lease=put.lease,
    )


def prefix_end(prefix: str) -> str | None:
    """The smallest text above all that begin with ``prefix``; None if there is no such text."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    surrogates = range(0xD800, 0xE000)  # not characters: they have no UTF-8 form
    return stem[:-1] + chr(surrogates.stop if following in surrogates else following)


def check_kept(revision: int, compacted: int) -> None:
    """GONE if history at ``revision`` was forgotten; ``compacted`` is the oldest revision still whole."""
    if revision < compacted:
        message = f"store revision {revision} was compacted away; the oldest kept is {compacted}"
        raise AlveoleError(ErrorCode.GONE, message, hint="list again and go on from the revision of that list")


def check_made(revision: int, current: int) -> None:
    """INVALID if the store has not come to ``revision`` yet."""
    if revision > current:
        raise invalid(f"store revision {revision} does not exist yet; the newest is {current}")


def compaction_due(current: int, compacted: int) -> int | None:
    """The revision to compact to now, keeping KEPT_REVISIONS, or None."""
    kept_from = current - KEPT_REVISIONS
    return kept_from if kept_from - compacted >= COMPACTION_STEP else None
