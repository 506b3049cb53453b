"""The event stream: every change of a project's records, resumable from a revision."""

import re
from collections.abc import AsyncIterator
from typing import Any

from alveole.model.error import AlveoleError, ErrorCode, invalid
from alveole.store.base import Store


def token(store: Store, revision: int) -> str:
    return f"{store.id}:{revision}"


def parse_token(store: Store, text: str) -> int:
    """The revision of a token. Raises GONE if it is of another store, INVALID if it is none."""
    identifier, _, revision = text.partition(":")
    if not re.fullmatch(r"[0-9]{1,18}", revision):
        raise invalid(f"{text!r} is not an event token", hint="tokens look like 1a2b3c4d:42", field="from")
    if identifier != store.id:
        raise AlveoleError(ErrorCode.GONE, "this event token is of another store", hint="list again")
    return int(revision)


async def events(store: Store, project: str, after: int) -> AsyncIterator[dict[str, Any]]:
    """Changes after a revision. Raises GONE if the store no longer has them."""
    prefix = f"projects/{project}/"
    async for changes in store.watch(prefix, after + 1):
        for change in changes:
            _, _, plural, name = change.key.split("/", 3)
            first = change.value is not None and change.value.version == 1
            action = "removed" if change.value is None else "created" if first else "updated"
            yield {
                "action": action,
                "kind": plural.removesuffix("s"),
                "name": name,
                "revision": token(store, change.revision),
                "object": change.value.value if change.value is not None else None,
            }
