"""Makes the initramfs of machines: our guest programs, and the host's busybox, crun and dropbear with their libraries.

Run as a child of the daemon: ``python -m alveole.runtime.qemu.initramfs VERSION MODULES TARGET``.
"""

import lzma
import re
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

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


def make(kernel_version: str, modules: Path, target: Path) -> None:
    """Raises subprocess.CalledProcessError or OSError; ``target`` appears complete or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as name:
        tree = Path(name, "tree")
        _fill(tree, kernel_version, modules)
        archive = Path(name, "archive")
        paths = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        with archive.open("wb") as output:
            command = ["cpio", "--quiet", "--create", "--format=newc", "--owner=+0:+0"]
            subprocess.run(command, cwd=tree, input=paths.encode(), stdout=output, check=True)
        archive.rename(target)


def _fill(tree: Path, kernel_version: str, modules: Path) -> None:
    for directory in _DIRECTORIES:
        (tree / directory).mkdir(parents=True)
    for path, text in _FILES.items():
        (tree / path).write_text(text)
    for program in _INCLUDED:
        _add_program(tree, Path(shutil.which(program) or program))
    for script in GUEST.iterdir():
        shutil.copy(script, tree / ("init" if script.name == "init" else f"bin/{script.name}"))
    for applet in _lines(["busybox", "--list"]):
        link = tree / "bin" / applet
        if not link.exists():
            link.symlink_to("busybox")
    _add_modules(tree, kernel_version, modules)
    key = ["dropbearkey", "-t", "ed25519", "-f", str(tree / "etc/dropbear/key")]
    subprocess.run(key, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def _add_program(tree: Path, program: Path) -> None:
    shutil.copy(program, tree / "bin" / program.name)
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    if listed.returncode:
        return  # it is static
    for library in re.findall(r"(?:=> |^\t)(/\S+) \(0x", listed.stdout, re.MULTILINE):
        copy = tree / library.lstrip("/")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, copy)


def _add_modules(tree: Path, kernel_version: str, modules: Path) -> None:
    """Uncompressed, in the order in which they can be loaded."""
    order: list[str] = []
    for module in _MODULES:
        for line in _lines(["modprobe", "--set-version", kernel_version, "--show-depends", module]):
            if not line.startswith("insmod "):
                continue  # "builtin NAME"
            file = Path(line.split()[1])
            name = file.name.removesuffix(".xz")
            if name not in order:
                order.append(name)
                content = file.read_bytes()
                (tree / "modules" / name).write_bytes(lzma.decompress(content) if file.suffix == ".xz" else content)
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in order))


def _lines(command: list[str]) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
