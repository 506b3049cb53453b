"""A machine duplicated by hand, as QEMU offers it: its memory is migrated to a file, and another starts from there."""

import io
import json
import os
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.integration.daemon import until
from tests.perf.raw import machine

_BOOT_S = 120.0
_MIGRATE_S = 120.0
_POLL_S = 0.003


class ByHand:
    """A running QEMU with neither disk nor network, of whose memory so much has been written."""

    def __init__(self, monitor: "Monitor", argv: list[str], directory: Path) -> None:
        self._monitor, self._argv, self._directory = monitor, argv, directory

    def fork(self) -> tuple[float, float]:
        """Seconds that the original stood still, and until a second QEMU runs. That is ended then."""
        state, began = self._directory / "state", time.perf_counter()
        self._monitor.execute("stop")
        self._monitor.execute("migrate", {"uri": f"file:{state}"})
        until_status(self._monitor, "query-migrate", "completed", _MIGRATE_S)
        self._monitor.execute("cont")
        pause_s = time.perf_counter() - began
        with running([*self._argv, "-incoming", f"file:{state}"], self._directory / "copy") as (copy, _):
            until_status(copy, "query-status", "paused", _MIGRATE_S)  # as the original was
            copy.execute("cont")
            total_s = time.perf_counter() - began
        state.unlink()
        return pause_s, total_s


@contextmanager
def by_hand(
    kernel: Path, initramfs: Path, directory: Path, *, accelerator: str, memory_mib: int, held_mib: int
) -> Iterator[ByHand]:
    argv = machine(kernel, initramfs, accelerator, memory_mib)
    with running(argv, directory / "original") as (monitor, place):
        told = place / "told"
        until(lambda: "waiting" in told.read_text(), _BOOT_S, "the guest's word")
        (place / "control.in").write_bytes(_request(held_mib))
        until(lambda: "held" in told.read_text(), _BOOT_S, "the guest's memory")
        yield ByHand(monitor, argv, directory)


def _request(held_mib: int) -> bytes:
    """What the guest is told: to write so much memory, and then nothing."""
    script = f"tr '\\0' x </dev/zero | head -c {held_mib}m >/tmp/held\necho held >&9\nsleep 2147483647\n".encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as file:
        member = tarfile.TarInfo("setup")
        member.size = len(script)
        file.addfile(member, io.BytesIO(script))
    content = archive.getvalue()
    return f"seed {len(content)} {time.time():.0f}\n".encode() + content


@contextmanager
def running(argv: list[str], place: Path) -> Iterator[tuple["Monitor", Path]]:
    """A QEMU, with files of its own: its monitor and its place."""
    place.mkdir(exist_ok=True)
    for name in ("control.in", "control.out"):
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)
    (place / "told").write_text("")
    own = [*("-chardev", f"pipe,id=control,path={place}/control"), *("-chardev", f"file,id=status,path={place}/told")]
    qmp = ["-qmp", f"unix:{place}/qmp,server=on,wait=off"]
    (place / "qmp").unlink(missing_ok=True)
    with subprocess.Popen([*argv, *own, *qmp], stdin=subprocess.DEVNULL) as process:
        try:
            monitor = Monitor(place / "qmp")
            yield monitor, place
            monitor.close()
        finally:
            process.kill()


class Monitor:
    """QEMU's, one command after the other."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        until(lambda: self._socket.connect_ex(str(path)) == 0, _BOOT_S, "QEMU's monitor")
        self._lines = self._socket.makefile("r")
        self._lines.readline()  # its greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: Any = None) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def until_status(monitor: Monitor, command: str, wanted: str, timeout_s: float) -> None:
    """Asked more often than ``until`` does: what is waited for may take milliseconds."""
    deadline = time.monotonic() + timeout_s
    while (status := monitor.execute(command).get("status")) != wanted:
        assert time.monotonic() < deadline, f"{command} still says {status}"
        assert status != "failed", command
        time.sleep(_POLL_S)
