"""A guest's own kernel reads a seed, with its usual options: whether the one who wrote it can read it proves little."""

import base64
import lzma
import platform
import subprocess
from pathlib import Path

import pytest

from alveole.image.seed import make_seed

pytestmark = pytest.mark.root

MODULES = ("virtio_pci", "virtio_blk", "isofs")
INIT = """#!/bin/busybox sh
for module in /modules/*; do /bin/busybox insmod $module; done
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t iso9660 -o ro /dev/vda /seed
cd /seed
for name in *; do echo "file $name $(/bin/busybox base64 -w 0 $name)"; done
/bin/busybox poweroff -f
"""
BOOT_S = 150


def guest_kernel() -> tuple[str, Path]:
    """Version and image of the newest kernel for guests that is installed, all its modules with it."""
    found = sorted(Path("/boot").glob("vmlinuz-*-amd64"))
    if not found or platform.machine() != "x86_64":
        pytest.skip("this host has no kernel for x86_64 guests: Debian's package linux-image-amd64")
    return found[-1].name.removeprefix("vmlinuz-"), found[-1]


def initramfs(directory: Path, version: str) -> Path:
    for name in ("bin", "dev", "seed", "modules"):
        (directory / name).mkdir(parents=True)
    (directory / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (directory / "bin/busybox").chmod(0o755)
    (directory / "init").write_text(INIT)
    (directory / "init").chmod(0o755)
    argv = ["modprobe", "--set-version", version, "--show-depends", "--all", *MODULES]
    told = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    files = dict.fromkeys(line.split()[1] for line in told if line.startswith("insmod "))
    for number, file in enumerate(map(Path, files)):
        data = file.read_bytes()
        content = lzma.decompress(data) if file.suffix == ".xz" else data
        (directory / "modules" / f"{number:02}-{file.name.partition('.')[0]}.ko").write_bytes(content)
    names = "\n".join(str(path.relative_to(directory)) for path in sorted(directory.rglob("*")))
    made = directory.with_suffix(".cpio")
    made.write_bytes(
        subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet"],
            input=names.encode(),
            cwd=directory,
            check=True,
            capture_output=True,
        ).stdout
    )
    return made


async def test_a_guest_reads_it(tmp_path: Path) -> None:
    version, kernel = guest_kernel()
    seed = tmp_path / "seed.iso"
    user_data = "#cloud-config\n# naïve ✓\n" + "x" * 5000
    await make_seed(
        seed,
        instance_id="0123456789ab",
        hostname="web-1",
        user_data=user_data,
        ssh_keys=(),
        address="192.0.0.2",
        gateway="192.0.0.1",
        mac="02:00:00:00:00:04",
        nameserver="10.64.0.1",
    )
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults", "-no-reboot", "-display", "none"]
    argv += ["-kernel", str(kernel), "-initrd", str(initramfs(tmp_path / "root", version))]
    argv += ["-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio"]
    argv += ["-drive", f"file={seed},format=raw,if=virtio,readonly=on"]
    told = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=BOOT_S).stdout
    files = dict(line.split()[1:] for line in told.splitlines() if line.startswith("file "))
    assert set(files) == {"meta-data", "user-data", "network-config"}, told
    assert base64.b64decode(files["user-data"]).decode() == user_data
