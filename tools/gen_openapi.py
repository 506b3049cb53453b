"""Writes docs/reference/openapi.json from the routes themselves, so that it cannot say anything else.

Run `python tools/gen_openapi.py`. With `--check` nothing is written: the exit code tells whether it is current.
"""

import json
import sys
from pathlib import Path

from alveole.api.app import ROUTES
from alveole.api.openapi import describe

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "openapi.json"
VERSION = "v1"
"""Of the API: the page does not change with each release of the program."""


def page() -> str:
    return json.dumps(describe(ROUTES, VERSION), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> int:
    current = page()
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.exists() and PAGE.read_text() == current else 1
    PAGE.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
