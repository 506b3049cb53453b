"""What the command line loads, and what is generated from it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon_double import Double, Reply, instance, serving

HEAVY = {
    "pydantic",
    "asyncio",
    "websockets",
    "rich",
    "email",
    "ssl",
    "http",
    "subprocess",
    "logging",
    "tomllib",
    "pathlib",
}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Double]:
    with serving(tmp_path / "s") as double:
        double.answers["GET /v1/instances"] = Reply({"items": [instance("web"), instance("db")], "revision": "x:1"})
        yield double


def modules(*arguments: str, environment: dict[str, str] | None = None) -> tuple[set[str], str]:
    """Modules that a command line imports, and what it prints."""
    code = (
        "import sys; before = set(sys.modules); from alveole.cli.main import run\n"
        "try: run(sys.argv[1:])\n"
        "finally: print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={**os.environ, **(environment or {})},
    )
    return set(done.stderr.split()), done.stdout


def test_ls_imports_nothing_heavy(daemon: Double) -> None:
    """Process start to output must stay below 100 ms: each of these costs 5 to 150."""
    loaded, out = modules("--socket", daemon.path, "ls", "-q")
    assert len(out.splitlines()) == 2
    assert {name.partition(".")[0] for name in loaded} & HEAVY == set()
    verbs = {name for name in loaded if name.startswith("alveole.cli.")}
    assert verbs == {f"alveole.cli.{name}" for name in ("main", "context", "ls", "listing", "options", "output")}


def test_help_imports_no_verb() -> None:
    loaded, out = modules("--help")
    assert "completion" in out
    assert {name for name in loaded if name.startswith("alveole.c")} <= {
        "alveole.cli",
        "alveole.cli.main",
        "alveole.cli.context",
        "alveole.client",
        "alveole.client.errors",
    }


def test_the_shell_completes_verbs_without_importing_them(daemon: Double) -> None:
    asked = {"_ALVEOLE_COMPLETE": "bash_complete", "COMP_WORDS": "alveole res", "COMP_CWORD": "1"}
    loaded, out = modules(environment=asked)
    assert out.split() == ["plain,restart"]
    assert "alveole.cli.restart" not in loaded


def test_the_shell_completes_names_of_instances(daemon: Double) -> None:
    asked = {"_ALVEOLE_COMPLETE": "bash_complete", "COMP_WORDS": "alveole stop w", "COMP_CWORD": "2"}
    _, out = modules(environment={**asked, "ALVEOLE_SOCKET": daemon.path})
    assert out.split() == ["plain,web"]
    _, out = modules(environment={**asked, "ALVEOLE_SOCKET": "/nonexistent"})
    assert out.split() == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str) -> None:
    _, out = modules("completion", shell)
    assert f"_ALVEOLE_COMPLETE={shell}_complete" in out


def test_the_reference_is_current() -> None:
    """docs/reference/cli.md is what tools/gen_cli_reference.py writes."""
    tool = [sys.executable, str(REPOSITORY / "tools" / "gen_cli_reference.py"), "--check"]
    assert subprocess.run(tool, check=False).returncode == 0, "run tools/gen_cli_reference.py"
