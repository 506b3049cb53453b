"""What a machine that runs an OCI image boots: the host's newest Debian kernel, and an initramfs made for it here."""

import asyncio
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from alveole.host.blocking import in_thread
from alveole.host.process import run
from alveole.model.error import unsupported
from alveole.runtime.qemu.initramfs import PROGRAMS, recipe_digest

_BUILD_TIMEOUT_S = 300.0
_PACKAGE_HINT = "install linux-image-amd64 of bookworm-backports, or a later Debian's"
_LEAST_VERSION = (6, 7)  # has a driver for vmgenid, so that clones draw different random numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    version: str
    image: Path
    modules: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    kernel: Kernel
    initramfs: Path


def find_kernel(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> Kernel:
    """The newest kernel installed with its modules. Raises AlveoleError(UNSUPPORTED) if none is new enough."""
    found = []
    for image in boot.glob("vmlinuz-*"):
        version = image.name.removeprefix("vmlinuz-")
        numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
        if (modules / version / "kernel").is_dir() and numbers >= _LEAST_VERSION:
            found.append((numbers, Kernel(version=version, image=image, modules=modules / version)))
    if not found:
        raise unsupported(f"no Linux kernel for machines in {boot} and {modules}", hint=_PACKAGE_HINT)
    return max(found, key=lambda entry: entry[0])[1]


class BootFiles:
    """Makes the initramfs when it is first asked for, and again when what it is made of has changed."""

    def __init__(self, directory: Path) -> None:
        """``directory`` persists and is this daemon's own."""
        self._directory = directory
        self._lock = asyncio.Lock()
        self._made: Boot | None = None

    async def ensure(self) -> Boot:
        """Raises AlveoleError(UNSUPPORTED) naming a program or kernel that the host lacks."""
        async with self._lock:
            if self._made is None or not self._made.initramfs.exists():
                self._made = await self._make()
            return self._made

    async def _make(self) -> Boot:
        kernel = find_kernel()
        for program, package in PROGRAMS.items():
            if not shutil.which(program):
                raise unsupported(f"{program} is not installed", hint=f"install the package {package}")
        digest = await in_thread(lambda: recipe_digest(kernel.version))
        initramfs = self._directory / f"initramfs-{digest}"
        if not initramfs.exists():
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o711)
            for stale in self._directory.glob("initramfs-*"):
                await run(["rm", "-rf", "--", str(stale)], timeout_s=_BUILD_TIMEOUT_S)
            module = "alveole.runtime.qemu.initramfs"
            argv = [sys.executable, "-I", "-m", module, kernel.version, str(kernel.modules), str(initramfs)]
            await run(argv, timeout_s=_BUILD_TIMEOUT_S)
        return Boot(kernel=kernel, initramfs=initramfs)
