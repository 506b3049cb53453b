"""Programs run from sealed copies in memory."""

import subprocess
from pathlib import Path

import pytest

from alveole.host.sealed import sealed_copy


def test_a_copy_runs_under_the_name_of_its_link(tmp_path: Path) -> None:
    program = sealed_copy(Path("/bin/cat"), tmp_path / "cat")
    assert program == tmp_path / "cat"
    done = subprocess.run([program, "/proc/self/comm"], check=True, capture_output=True, text=True)
    assert done.stdout == "cat\n"


def test_nobody_can_change_a_copy(tmp_path: Path) -> None:
    program = sealed_copy(Path("/bin/cat"), tmp_path / "cat")
    with program.open("r+b", buffering=0) as copy, pytest.raises(PermissionError):
        copy.write(b"#!")
    with pytest.raises(PermissionError), program.open("wb"):
        pass  # would empty it


def test_a_link_left_by_a_former_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "cat").symlink_to("/proc/0/fd/0")
    subprocess.run([sealed_copy(Path("/bin/cat"), tmp_path / "cat"), "/dev/null"], check=True)
