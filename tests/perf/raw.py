"""The engines by themselves: what `crun run` and `runsc run` cost without Alveole."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.perf.harness import command


def make_bundle(directory: Path, image: Path, engine: Sequence[str]) -> Path:
    """The engine's own default specification, running `true` in the root file system ``image``."""
    root = directory / "rootfs"
    root.mkdir(parents=True)
    command("tar", "-C", str(root), "-xf", str(image))
    subprocess.run([*engine, "spec"], cwd=directory, check=True, capture_output=True)
    config = json.loads((directory / "config.json").read_text())
    config["process"] |= {"args": ["true"], "terminal": False}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def run_once(engine: Sequence[str], bundle: Path) -> None:
    """Create, start, wait and delete."""
    state = bundle / "state"
    command(*engine, "--root", str(state), "run", "--bundle", str(bundle), "alveole-bench-raw")
    shutil.rmtree(state, ignore_errors=True)
