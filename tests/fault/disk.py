"""A small disk of its own, for a state directory that runs out of space."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.fault.host import SETTLE_S, Victim
from tests.integration.daemon import until


class Disk:
    """A small file system of its own."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.place = directory / "disk"
        self._image, self._ballast = directory / "disk.img", self.place / "ballast"
        self.place.mkdir()
        with self._image.open("wb") as image:
            image.truncate(size_bytes)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", self._image], check=True)
        subprocess.run(["mount", "-o", "loop", self._image, self.place], check=True)
        self.place.chmod(0o711)

    def fill(self, leave_bytes: int = 0) -> None:
        """To the last block, but for ``leave_bytes``."""
        with self._ballast.open("wb", buffering=0) as file, suppress(OSError):
            for size in (1 << 20, 4096):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        continue
            file.flush()
            os.fsync(file.fileno())
        if leave_bytes:
            os.truncate(self._ballast, self._ballast.stat().st_size - leave_bytes)

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.place], check=True)


@contextmanager
def small_disk(size_bytes: int) -> Iterator[Disk]:
    with TemporaryDirectory(prefix="alv-f-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        made = Disk(directory, size_bytes)
        yield made
        until(lambda: _unmounted(made), SETTLE_S, "an unmounted disk")


def _unmounted(disk: Disk) -> bool:
    with suppress(subprocess.CalledProcessError):
        disk.unmount()
        return True
    return False


def refused(victim: Victim, method: str, path: str, body: Any) -> dict[str, Any]:
    """The error of a request or of its operation, which says that space is lacking."""
    status, found = victim.api(method, path, body)
    error: dict[str, Any] = found["error"] if status >= 400 else victim.outcome(found)["error"]
    assert error["code"] == "exhausted", error
    assert error["hint"], error
    return error
