"""Docker Engine as Debian packages it, in namespaces of its own, gone without a trace afterwards."""

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.integration.daemon import until
from tests.perf.harness import ask, command

CLIENT = "/usr/bin/docker"  # of the same package as the engine
IMAGE = "busybox"
_START_S = 60.0
# It writes to /run and /etc/docker whatever it is told. First in its process namespace: all end with it.
_ALONE = """
mount -t tmpfs tmpfs /run
mkdir -p /etc/docker && mount -t tmpfs tmpfs /etc/docker
ip link set lo up
exec "$@"
"""


class Docker:
    def __init__(self, directory: Path) -> None:
        self.socket = directory / "docker.sock"
        self.log = directory / "docker.log"
        self.cgroup = f"alveole-bench-{secrets.token_hex(4)}"
        self._directory = directory

    def argv(self) -> list[str]:
        ends_with_us = ["setpriv", "--pdeathsig", "KILL"]
        alone = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return [
            *(*ends_with_us, *alone, "sh", "-ec", _ALONE, "sh"),
            *("dockerd", "--data-root", f"{self._directory}/data", "--exec-root", f"{self._directory}/exec"),
            *("--pidfile", f"{self._directory}/pid", "--host", f"unix://{self.socket}"),
            *("--cgroup-parent", self.cgroup),
        ]

    def answers(self) -> bool:
        try:
            return bool(self.api("GET", "/version"))
        except OSError:
            return False

    def api(self, method: str, target: str, body: Any = None) -> Any:
        return ask(self.socket, method, target, body)

    def cli(self, *arguments: str) -> str:
        return command(CLIENT, "--host", f"unix://{self.socket}", *arguments)

    def start_by_api(self, *argv: str) -> str:
        """Create a container and start it; its id."""
        made = self.api("POST", "/containers/create", {"Image": IMAGE, "Cmd": argv})
        self.api("POST", f"/containers/{made['Id']}/start")
        return str(made["Id"])

    def processes(self) -> dict[str, list[int]]:
        """Its processes by name, without those of its containers."""
        found: dict[str, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                argv = (path / "cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if any(str(self._directory) in argument for argument in argv):
                found.setdefault(Path(argv[0]).name, []).append(int(path.name))
        return found


@contextmanager
def running_docker(directory: Path, image: Path) -> Iterator[Docker]:
    """With the root file system ``image`` (a tar) as its image "busybox"."""
    directory.mkdir()
    docker = Docker(directory)
    with docker.log.open("wb") as log:
        process = subprocess.Popen(docker.argv(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: process.poll() is not None or docker.answers(), _START_S, "dockerd's answer")
        assert process.poll() is None, docker.log.read_text()
        docker.cli("import", str(image), IMAGE)
        yield docker
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        for top in Path("/sys/fs/cgroup").rglob(docker.cgroup):
            until(lambda top=top: _removed(top), what=f"removal of {top}")  # type: ignore[misc]
        shutil.rmtree(directory)


def _removed(cgroup: Path) -> bool:
    """Whether it and all below is gone: its processes end a moment after they were killed."""
    for path, _, _ in os.walk(cgroup, topdown=False):
        try:
            Path(path).rmdir()
        except OSError:
            return False
    return not cgroup.exists()
