"""Which layer a build step made last time: a file per step, named by everything the step depended on."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

_KEY = re.compile(r"[0-9a-f]{64}")
_DIFF_ID = re.compile(r"sha256:[0-9a-f]{64}")


def step_key(parents: Sequence[str], *definition: object) -> str:
    """Of the layers below, lowest first, and of what the step does (JSON values)."""
    return hashlib.sha256(json.dumps([list(parents), definition]).encode()).hexdigest()


class BuildCache:
    """A record counts only while the image store still has its layer."""

    def __init__(self, directory: Path, has_layer: Callable[[str], bool]) -> None:
        self._directory = directory
        self._has_layer = has_layer

    def layer(self, key: str) -> str:
        """The diff id of the layer this step made; empty if it must be made."""
        path = self._directory / key
        diff_id = path.read_text(errors="replace") if path.exists() else ""
        return diff_id if self._valid(diff_id) else ""

    def remember(self, key: str, diff_id: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        temporary = self._directory / "new"
        temporary.write_text(diff_id)
        temporary.rename(self._directory / key)

    def prune(self) -> None:
        """Forget layers that the store has not any more, and what a killed daemon half wrote."""
        for path in self._directory.glob("*"):
            if not _KEY.fullmatch(path.name) or not self._valid(path.read_text(errors="replace")):
                path.unlink()

    def _valid(self, diff_id: str) -> bool:
        """Without an fsync, a record may be empty after a power cut: then it is made again."""
        return bool(_DIFF_ID.fullmatch(diff_id)) and self._has_layer(diff_id)
