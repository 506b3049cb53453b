"""The engines by themselves: what `crun run`, `runsc run` and a boot of QEMU cost without Alveole."""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.integration.daemon import until
from tests.perf.harness import command, pss_bytes

MACHINE_MIB = 256
_BOOT_S = 60.0


def make_bundle(directory: Path, image: Path, engine: Sequence[str]) -> Path:
    """The engine's own default specification, running `true` in the root file system ``image``."""
    root = directory / "rootfs"
    root.mkdir(parents=True)
    command("tar", "-C", str(root), "-xf", str(image))
    subprocess.run([*engine, "spec"], cwd=directory, check=True, capture_output=True)
    config = json.loads((directory / "config.json").read_text())
    config["process"] |= {"args": ["true"], "terminal": False}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def run_once(engine: Sequence[str], bundle: Path) -> None:
    """Create, start, wait and delete."""
    state = bundle / "state"
    command(*engine, "--root", str(state), "run", "--bundle", str(bundle), "alveole-bench-raw")
    shutil.rmtree(state, ignore_errors=True)


def boot_once(kernel: Path, initramfs: Path, directory: Path, *, accelerator: str) -> tuple[float, int]:
    """A machine by hand: QEMU with this kernel and initramfs, neither disk nor network, until the first process of its
    guest says "waiting". Returns the seconds that took, and the memory (PSS) of QEMU then."""
    told = directory / "told"
    told.unlink(missing_ok=True)
    began = time.perf_counter()
    argv = [*machine(kernel, initramfs, accelerator, MACHINE_MIB), "-chardev", "null,id=control"]
    with subprocess.Popen([*argv, "-chardev", f"file,id=status,path={told}"], stdin=subprocess.DEVNULL) as process:
        try:
            until(lambda: told.exists() and "waiting" in told.read_text(), _BOOT_S, "the guest's word")
            return time.perf_counter() - began, pss_bytes([process.pid])
        finally:
            process.kill()


def machine(kernel: Path, initramfs: Path, accelerator: str, memory_mib: int) -> list[str]:
    """QEMU's arguments. The character devices "control" and "status" have still to be given."""
    parameters = "console=ttyS0 quiet panic=-1 tsc=unstable no_timer_check random.trust_cpu=on mitigations=off"
    addresses = "control_address=169.254.0.2 control_gateway=169.254.0.1 gateway_mac=02:00:00:00:00:03"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "pc", "-no-reboot"),
        *("-accel", accelerator, "-cpu", "max", "-m", f"{memory_mib}M"),
        *("-kernel", str(kernel), "-initrd", str(initramfs), "-append", f"{parameters} {addresses}"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=control,name=control"),
        *("-device", "virtserialport,chardev=status,name=status", "-device", "virtserialport,name=commands"),
    ]
