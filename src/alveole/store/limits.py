"""The request limits every driver enforces, so that what one driver accepts all accept."""

from collections.abc import Iterator, Sequence

from alveole.model.error import AlveoleError, invalid
from alveole.store.base import MAX_OPERATIONS, MAX_PAGE, MAX_REQUEST_BYTES, Compare, Put, Write

MAX_LEASE_S = 9_000_000_000  # etcd's longest lease
_LEASE_IDS = range(1 << 63)


def check_prefix(prefix: str) -> None:
    """INVALID for text that has no UTF-8 form (lone surrogates)."""
    try:
        prefix.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"store key {prefix!r} is not valid UTF-8 text") from error


def check_key(key: str) -> None:
    if not key:
        raise invalid("a store key is empty", hint="give every key at least one character")
    check_prefix(key)


def page_size(limit: int) -> int:
    if limit < 1:
        raise invalid(f"a page of {limit} keys was asked for", hint=f"ask for 1 to {MAX_PAGE}")
    return min(limit, MAX_PAGE)


def check_ttl(ttl_s: int) -> None:
    if ttl_s % 1 or not 1 <= ttl_s <= MAX_LEASE_S:
        raise invalid(f"a lease of {ttl_s} s was asked for", hint=f"give whole seconds, 1 to {MAX_LEASE_S}")


def check_txn(compare: Sequence[Compare], then: Sequence[Write], otherwise: Sequence[Write]) -> None:
    """INVALID if there are too many operations or bytes, or if a branch could write a key twice."""
    for name, operations in (("comparisons", compare), ("then", then), ("otherwise", otherwise)):
        if len(operations) > MAX_OPERATIONS:
            raise _too_large(f"has {len(operations)} operations in {name}", f"at most {MAX_OPERATIONS}")
    for comparison in compare:
        check_key(comparison.key)
    for write in (*then, *otherwise):
        _check_write(write)
    if (size_bytes := sum(_sizes_bytes(compare, then, otherwise))) > MAX_REQUEST_BYTES:
        raise _too_large(f"has {size_bytes} bytes of keys and values", f"at most {MAX_REQUEST_BYTES}")
    _check_written_once(then)
    _check_written_once(otherwise)


def _too_large(what: str, limit: str) -> AlveoleError:
    return invalid(f"a store transaction {what}", hint=f"{limit} fit in one: split it")


def _check_write(write: Write) -> None:
    if isinstance(write, Put):
        check_key(write.key)
        if write.lease not in _LEASE_IDS:
            raise invalid(f"lease id {write.lease} of key {write.key!r} is out of range")
    elif write.prefix:
        check_prefix(write.key)
    else:
        check_key(write.key)


def _sizes_bytes(compare: Sequence[Compare], then: Sequence[Write], otherwise: Sequence[Write]) -> Iterator[int]:
    yield from (len(part.key.encode()) for part in (*compare, *then, *otherwise))
    yield from (len(write.value) for write in (*then, *otherwise) if isinstance(write, Put))


def _check_written_once(writes: Sequence[Write]) -> None:
    seen: set[str] = set()
    prefixes = [write.key for write in writes if not isinstance(write, Put) and write.prefix]
    for write in writes:
        covering = sum(write.key.startswith(prefix) for prefix in prefixes)
        covers_itself = not isinstance(write, Put) and write.prefix
        if write.key in seen or covering > covers_itself:
            raise invalid(f"a store transaction writes key {write.key!r} twice", hint="write a key once in a branch")
        seen.add(write.key)
