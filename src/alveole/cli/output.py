"""What commands print: tables for people, JSON and YAML for programs. Nothing is printed anywhere else but errors."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click

_SIZE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

BOLD = "bold"


def printable(text: str) -> str:
    """Text that came from an image or an instance, unable to move the cursor or colour the terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def line(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Something for the person, not for the pipe."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def records(objects: Any, form: str) -> None:
    """Objects as they came from the API."""
    if form == "json":
        line(json.dumps(objects, indent=2))
    else:
        from alveole.cli.yaml import to_yaml

        sys.stdout.write(to_yaml(objects))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns two spaces apart. The head is bold on a terminal."""
    cells = [[printable(cell) or "-" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (columns, *cells)) for i in range(len(columns))]
    head, *body = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *cells)
    )
    line(style(head.rstrip(), BOLD, sys.stdout))
    for row in body:
        line(row.rstrip())


def style(text: str, look: str, stream: Any) -> str:
    """Colour on a terminal that wants it (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return click.style(text, bold=True) if look == BOLD else click.style(text, fg=look)


def size(number: int | float | None) -> str:
    """Bytes for people, in powers of 1024 as limits are given."""
    if number is None:
        return ""
    amount = float(number)
    for unit in _SIZE_UNITS:
        if amount < 1024 or unit == _SIZE_UNITS[-1]:
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.1f} {unit}"


def span(seconds: float) -> str:
    """A length of time in its largest unit."""
    seconds = max(0.0, seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"


def age(moment: str | None, now: datetime | None = None) -> str:
    """How long ago an RFC 3339 time was."""
    if not moment:
        return ""
    return span(((now or datetime.now(UTC)) - datetime.fromisoformat(moment)).total_seconds())


def short_digest(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
