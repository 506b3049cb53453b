"""The program that tells a sandbox who it is, run here in namespaces of its own."""

import socket
import subprocess
from pathlib import Path

import pytest

from alveole.runtime.renewal import program

pytestmark = pytest.mark.root
NETWORK = " && ".join(
    ("ip link add eth0 type bridge", *(f"ip address add 10.9.0.{end} dev eth0" for end in ("1/24", "7/32", "8/32")))
)


def run(path: Path, content: bytes, script: str) -> subprocess.CompletedProcess[str]:
    path.write_bytes(content)
    path.chmod(0o755)
    command = ["unshare", "--uts", "--net", "sh", "-c", script, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["a", "a-name.with-63-characters" + "x" * 38])
def test_it_sets_the_host_name(tmp_path: Path, name: str) -> None:
    ran = run(tmp_path / "program", program(name, 2, ()), '"$0" && hostname')
    assert (ran.returncode, ran.stdout) == (0, f"{name}\n")
    assert socket.gethostname() != name


def test_it_takes_addresses_away(tmp_path: Path) -> None:
    script = f"{NETWORK} && $0 && hostname && ip -4 -brief address show dev eth0"
    ran = run(tmp_path / "program", program("name", 2, ("10.9.0.7", "10.9.0.8")), script)
    assert ran.returncode == 0
    assert ran.stdout.split()[0] == "name"
    assert "10.9.0.1/24" in ran.stdout
    assert "10.9.0.7" not in ran.stdout
    assert "10.9.0.8" not in ran.stdout


def test_it_tells_what_went_wrong(tmp_path: Path) -> None:
    script = f"{NETWORK} && $0"
    assert run(tmp_path / "program", program("name", 2, ("10.9.0.9",)), script).returncode == 99  # EADDRNOTAVAIL
    script = "setpriv --bounding-set -sys_admin $0"
    assert run(tmp_path / "program", program("name", 2, ()), script).returncode == 1  # EPERM
