"""A database that is written to all the time is forked, again and again: each copy is whole, and so is the original."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.conftest import MakeVictim, finish
from tests.fault.frozen import LONG_S
from tests.fault.host import SETTLE_S, Victim, send
from tests.integration.daemon import until

pytestmark = [pytest.mark.root, pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs sqlite3")]
# Each row bears its own checksum, and the table its number of rows, in one transaction.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows(id INTEGER PRIMARY KEY, content BLOB, checksum BLOB);
CREATE TABLE IF NOT EXISTS total(number INTEGER);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT * FROM total);
"""
_WRITE = (
    "BEGIN IMMEDIATE; INSERT INTO rows(id, content) VALUES($i, randomblob(500));"
    " UPDATE rows SET checksum = sha3(content) WHERE id = $i; UPDATE total SET number = number + 1; COMMIT;"
)
_WRITER = """
set -e
sqlite3 /db "$1"
i=$(sqlite3 /db 'SELECT coalesce(max(id), 0) FROM rows')
while :; do i=$((i + 1)); eval "echo \\"$2\\""; done | sqlite3 -bail -cmd '.timeout 60000' /db
"""
_CHECK = """
PRAGMA integrity_check;
SELECT count(*) FROM rows WHERE checksum IS NOT sha3(content);
SELECT (SELECT number FROM total) - (SELECT count(*) FROM rows);
"""


@pytest.fixture(scope="module")
def database_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of the host's own sqlite3, with the libraries it needs, and busybox."""
    directory = tmp_path_factory.mktemp("database")
    root = directory / "root"
    sqlite = shutil.which("sqlite3")
    assert sqlite
    libraries = subprocess.run(["ldd", sqlite], check=True, capture_output=True, text=True).stdout.split()
    for path in ("/bin/busybox", sqlite, *(word for word in libraries if word.startswith("/"))):
        target = root / path.removeprefix("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (root / "bin/sh").symlink_to("busybox")
    tar = directory / "database.tar"
    subprocess.run(["tar", "-C", root, "--owner=0", "--group=0", "-cf", tar, "."], check=True)
    return tar


@pytest.fixture(scope="module")
def victim(make_victim: MakeVictim, database_tar: Path) -> Iterator[Victim]:
    made = make_victim()
    try:
        made.ok("image", "import", "database", str(database_tar))
        yield made
        finish(made)
    finally:
        made.destroy()


def ask(victim: Victim, name: str, sql: str) -> str:
    return victim.ok("exec", name, "sqlite3", "-cmd", ".timeout 60000", "/db", sql, timeout=LONG_S)


def rows(victim: Victim, name: str) -> int:
    return int(ask(victim, name, "SELECT count(*) FROM rows"))


def whole(victim: Victim, name: str, at_least: int) -> None:
    """It has lost nothing, all of it is as it was written, and more is being written."""
    assert ask(victim, name, _CHECK) == "ok\n0\n0"
    seen = rows(victim, name)
    assert seen >= at_least
    until(lambda: rows(victim, name) > seen, LONG_S, f"{name} goes on writing")


def sound_disk(victim: Victim, name: str) -> None:
    """Of one that does not run. Its journal is replayed, and nothing else needs to be mended."""
    identifier = victim.instance(name)["id"]
    (disk,) = (path for path in victim.roots() if path.stem == identifier)
    assert subprocess.run(["e2fsck", "-p", disk], check=False, capture_output=True).returncode in {0, 1}
    checked = subprocess.run(["e2fsck", "-f", "-n", disk], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["wal", pytest.param("delete", marks=pytest.mark.slow)])
def test_forks_of_a_database_under_load(victim: Victim, mode: str) -> None:
    small = ("--isolation", "vm", "--memory", "192m")
    writer = ("sh", "-c", _WRITER, "sh", f"PRAGMA journal_mode={mode}; {_SCHEMA}", _WRITE)
    victim.ok("run", "-d", "--name", "db", *small, "database", *writer, timeout=LONG_S)
    until(lambda: victim.cli("exec", "db", "sqlite3", "/db", "SELECT id FROM rows LIMIT 1").stdout, LONG_S, "a row")
    pid = victim.instance("db")["status"]["pid"]
    names = [f"{mode}-{number}" for number in range(3)]
    for name, origin in zip(names, ("db", "db", names[0]), strict=True):
        known = rows(victim, origin)
        victim.ok("fork", "--name", name, origin, timeout=LONG_S)
        whole(victim, name, known)
    whole(victim, "db", rows(victim, "db"))
    assert victim.instance("db")["status"]["pid"] == pid
    for name in (names[-1], "db"):  # what was written is on its disk, too
        known = rows(victim, name)
        send(victim.instance(name)["status"]["pid"], signal.SIGKILL)
        victim.wait_phase(name, "exited", SETTLE_S)
        sound_disk(victim, name)
        victim.ok("start", name, timeout=LONG_S)
        whole(victim, name, known)
    victim.ok("rm", "-f", "db", *names)
