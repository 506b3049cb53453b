"""The linters' own verdicts, and the lock files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "argv",
    [
        (BIN / "ruff", "check", "--quiet"),
        (BIN / "ruff", "format", "--check", "--quiet"),
        (BIN / "lint-imports", "--no-cache"),
        ("shellcheck", *sorted((ROOT / "tools").glob("*.sh")), ROOT / ".ci/run"),
    ],
    ids=lambda argv: Path(argv[0]).name,
)
def test_linter(argv: tuple[str | Path, ...]) -> None:
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["run", "dev"])
def test_every_dependency_is_pinned_and_hashed_and_no_registry_is_named(name: str) -> None:
    text = (ROOT / f"requirements/{name}.txt").read_text()
    requirements = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert requirements
    assert all(re.match(r"[\w.-]+==[\w.]+ .*\\$", line) for line in requirements)
    assert text.count("==") - text.count("python_version ==") >= len(requirements)
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links", text)


def test_tests_have_all_that_runs() -> None:
    """What is installed to test is what is installed to run, and more."""
    pins = [
        set(re.findall(r"^[\w.-]+==[\w.]+", (ROOT / f"requirements/{name}.txt").read_text(), re.M))
        for name in ("run", "dev")
    ]
    assert pins[0] < pins[1]
