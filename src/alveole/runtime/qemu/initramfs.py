"""Makes the initramfs of machines: our guest programs, and the host's busybox, crun and dropbear with their libraries.

Run as a child of the daemon: ``python -m alveole.runtime.qemu.initramfs VERSION MODULES TARGET``.
"""

import asyncio
import lzma
import re
import shutil
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

from alveole.host.process import run

GUEST = Path(__file__).parent / "guest"
PROGRAMS = {
    "busybox": "busybox-static",
    "crun": "crun",
    "dropbear": "dropbear-bin",
    "dropbearkey": "dropbear-bin",
    "cpio": "cpio",
    "modprobe": "kmod",
}
"""Programs of the host that it is made of or made with, and the Debian packages that hold them."""

_TIMEOUT_S = 60.0
_INCLUDED = ("busybox", "crun", "dropbear")
_MODULES = ("virtio_blk", "virtio_net", "virtio-rng", "ext4", "9pnet_virtio", "9p", "pvpanic-pci", "overlay")
_DIRECTORIES = ("bin", "dev", "etc/dropbear", "lib", "modules", "proc", "root/.ssh", "run", "sys", "tmp")
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/shells": "/bin/sh\n",
}


def recipe_digest(kernel_version: str) -> str:
    """Changes whenever the result would, except for what the host's package manager keeps the same."""
    digest = sha256(kernel_version.encode())
    for path in (Path(__file__), *sorted(GUEST.iterdir())):
        digest.update(path.read_bytes())
    for program in PROGRAMS:
        found = Path(shutil.which(program) or program).resolve().stat()
        digest.update(f"{program} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


async def make(kernel_version: str, modules: Path, target: Path) -> None:
    """Raises AlveoleError or OSError; ``target`` appears complete or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as name:
        tree = Path(name, "tree")
        await _fill(tree, kernel_version, modules)
        archive = Path(name, "archive")
        paths = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        command = ["cpio", "--quiet", "--create", "--format=newc", "--owner=+0:+0", f"--file={archive}"]
        await run(command, cwd=str(tree), stdin=paths.encode(), timeout_s=_TIMEOUT_S)
        archive.rename(target)


async def _fill(tree: Path, kernel_version: str, modules: Path) -> None:
    for directory in _DIRECTORIES:
        (tree / directory).mkdir(parents=True)
    for path, text in _FILES.items():
        (tree / path).write_text(text)
    for program in _INCLUDED:
        await _add_program(tree, Path(shutil.which(program) or program))
    for script in GUEST.iterdir():
        shutil.copy(script, tree / ("init" if script.name == "init" else f"bin/{script.name}"))
    for applet in await _lines(["busybox", "--list"]):
        link = tree / "bin" / applet
        if not link.exists():
            link.symlink_to("busybox")
    await _add_modules(tree, kernel_version, modules)
    key = ["dropbearkey", "-t", "ed25519", "-f", str(tree / "etc/dropbear/key")]
    await run(key, timeout_s=_TIMEOUT_S)


async def _add_program(tree: Path, program: Path) -> None:
    shutil.copy(program, tree / "bin" / program.name)
    listed = await run(["ldd", str(program)], timeout_s=_TIMEOUT_S, check=False)  # fails for a static program
    for library in re.findall(r"(?:=> |^\t)(/\S+) \(0x", listed.text, re.MULTILINE):
        copy = tree / library.lstrip("/")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, copy)


async def _add_modules(tree: Path, kernel_version: str, modules: Path) -> None:
    """Uncompressed, in the order in which they can be loaded."""
    order: list[str] = []
    for module in _MODULES:
        for line in await _lines(["modprobe", "--set-version", kernel_version, "--show-depends", module]):
            if not line.startswith("insmod "):
                continue  # "builtin NAME"
            file = Path(line.split()[1])
            name = file.name.removesuffix(".xz")
            if name not in order:
                order.append(name)
                content = file.read_bytes()
                (tree / "modules" / name).write_bytes(lzma.decompress(content) if file.suffix == ".xz" else content)
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in order))


async def _lines(command: list[str]) -> list[str]:
    return (await run(command, timeout_s=_TIMEOUT_S)).text.splitlines()


if __name__ == "__main__":
    asyncio.run(make(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
