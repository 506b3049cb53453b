"""What a machine said last, to tell with an error."""

from pathlib import Path

from alveole.model.error import AlveoleError
from alveole.runtime.qemu.argv import CONSOLE, WORDS

_LIMIT_BYTES = 4096


def with_words(error: AlveoleError, place: Path) -> AlveoleError:
    """With QEMU's own last words, or the guest kernel's."""
    words = _tail(place / WORDS) or _tail(place / CONSOLE)
    return AlveoleError(error.code, f"{error.message}: {words}", hint=error.hint) if words else error


def _tail(path: Path) -> str:
    """The end of a text file that a hostile process may have written."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LIMIT_BYTES))
            lines = file.read(_LIMIT_BYTES).decode(errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    return " ".join("".join(c for c in line if c.isprintable()) for line in lines[-4:]).strip()
