"""The kernel and the processor: version, virtualisation, what this process may do, limits of the whole host."""

import json
import os
import platform
import re
import resource
import sys
from pathlib import Path

from alveole.host.probe.finding import Finding, Status, needs_root
from alveole.host.process import run
from alveole.model.error import AlveoleError

IDMAP_OVERLAY_KERNEL = (5, 19)  # overlays of id-mapped layers
EMULATED_RATIO = 20.0  # guest code this many times slower than the host's does not run on the processor itself
KVM_DEADLINE_S = 1.5

CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "NET_ADMIN": 12,
    "SYS_CHROOT": 18,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "MKNOD": 27,
}
"""Those that the daemon uses, with their bit numbers."""

MINIMUM_LIMITS = {
    "net.ipv4.neigh.default.gc_thresh3": 4096,
    "fs.inotify.max_user_instances": 1024,
    "fs.inotify.max_user_watches": 65536,
    "fs.mount-max": 100_000,
    "kernel.pid_max": 65536,
    "user.max_net_namespaces": 4096,
    "user.max_user_namespaces": 4096,
}
"""What about a thousand instances on one host take."""

WANTED_OPEN_FILES = 65536
NEEDED_OPEN_FILES = 4096


def kernel(release: str | None = None) -> Finding:
    """``release``: as uname tells it; None: this host's."""
    release = release or platform.release()
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    status = Status.OK
    means = "new enough for id-mapped layers: every container has its own user ids and shares its image's files"
    fix = ""
    if version < IDMAP_OVERLAY_KERNEL:
        status, fix = Status.MISSING, "install a newer kernel: Debian 12's own 6.1 is enough"
        means = "overlays of id-mapped layers need kernel 5.19: containers with user ids of their own cannot start"
    return Finding(name="kernel", status=status, needed=True, found=release, means=means, fix=fix)


async def kvm() -> Finding:
    """Whether guest kernel code runs on the processor itself, measured in a child that may hang."""
    if skipped := needs_root("kvm", needed=False):
        return skipped
    if platform.machine() != "x86_64":
        return _kvm_absent(f"not measured on {platform.machine()}")
    child = Path(__file__).with_name("kvm_child.py")
    try:
        done = await run([sys.executable, "-I", str(child)], timeout_s=KVM_DEADLINE_S)
    except AlveoleError:
        return _kvm_emulated(f"a guest's first kernel instructions did not end within {KVM_DEADLINE_S:g} s")
    return judge_kvm(json.loads(done.text))


def judge_kvm(measured: dict[str, float | str]) -> Finding:
    """``measured``: what kvm_child printed."""
    if "error" in measured:
        return _kvm_absent(str(measured["error"]))
    guest_ns, native_ns = float(measured["guest_ns"]), float(measured["native_ns"])
    found = f"a loop takes {guest_ns:.3g} ns in a guest's kernel and {native_ns:.3g} ns here"
    if guest_ns > native_ns * EMULATED_RATIO:
        return _kvm_emulated(found)
    return Finding(
        name="kvm", status=Status.OK, needed=False, found=f"native: {found}", means="virtual machines run at full speed"
    )


def _kvm_absent(why: str) -> Finding:
    return Finding(
        name="kvm",
        status=Status.WARN,
        needed=False,
        found=f"absent: {why}",
        means="containers and sandboxes do not need it; virtual machines would be interpreted",
        fix="enable virtualisation in the firmware, or nested virtualisation for this virtual machine",
    )


def _kvm_emulated(found: str) -> Finding:
    return Finding(
        name="kvm",
        status=Status.WARN,
        needed=False,
        found=f"emulated: {found}",
        means="/dev/kvm is there, but this host emulates guest kernels one instruction at a time: "
        "virtual machines are better interpreted by QEMU here, and runsc must not use it",
        fix="nothing can be done on this host: choose one with real or hardware-nested virtualisation",
    )


def capabilities(status_text: str | None = None) -> Finding:
    """``status_text``: of /proc/PID/status; None: this process's."""
    if status_text is None and (skipped := needs_root("capabilities", needed=True)):
        return skipped
    text = status_text or Path("/proc/self/status").read_text()
    held = int(re.findall(r"^CapEff:\s*([0-9a-f]+)", text, re.MULTILINE)[0], 16)
    lacking = [f"CAP_{name}" for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    if not lacking:
        return Finding(
            name="capabilities",
            status=Status.OK,
            needed=True,
            found="all that are used",
            means="the daemon can make namespaces, mounts, devices and rules",
        )
    return Finding(
        name="capabilities",
        status=Status.MISSING,
        needed=True,
        found=f"lacks {', '.join(lacking)}",
        means="the daemon cannot make what instances consist of",
        fix="run as root, and not inside a container that drops capabilities",
    )


def open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "unlimited" if hard == resource.RLIM_INFINITY else f"at most {hard}"
    limit = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    enough = limit >= WANTED_OPEN_FILES
    return Finding(
        name="open files",
        status=Status.OK if enough else Status.WARN if limit >= NEEDED_OPEN_FILES else Status.MISSING,
        needed=True,
        found=found,
        means="enough for the daemon and its instances"
        if enough
        else f"no process in an instance may open more than {found.removeprefix('at most ')} files",
        fix=""
        if enough
        else f"LimitNOFILE={WANTED_OPEN_FILES * 8} in the daemon's unit, or ulimit -Hn before starting it",
    )


def limits(values: dict[str, int] | None = None) -> Finding:
    """``values``: of the sysctls in MINIMUM_LIMITS; None: read them."""
    values = _read_sysctls() if values is None else values
    low = {name: wanted for name, wanted in MINIMUM_LIMITS.items() if values.get(name, wanted) < wanted}
    if not low:
        return Finding(
            name="kernel limits",
            status=Status.OK,
            needed=False,
            found="as wanted",
            means="room for a thousand instances",
        )
    settings = " ".join(f"{name}={wanted}" for name, wanted in low.items())
    return Finding(
        name="kernel limits",
        status=Status.WARN,
        needed=False,
        found=", ".join(f"{name} is {values[name]}" for name in low),
        means="enough for some hundred instances, not for a thousand",
        fix=f"raise them, and keep them in /etc/sysctl.d: {settings}",
        command=f"sysctl --quiet --write {settings}",
    )


def _read_sysctls() -> dict[str, int]:
    paths = {name: Path("/proc/sys", name.replace(".", "/")) for name in MINIMUM_LIMITS}
    return {name: int(path.read_text()) for name, path in paths.items() if path.exists()}


def processes() -> Finding:
    """The number of processes this process's cgroup and the kernel leave room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    threads = int(Path("/proc/sys/kernel/threads-max").read_text())
    allowed = threads if hard == resource.RLIM_INFINITY else min(hard, threads)
    enough = allowed >= 4096
    return Finding(
        name="processes",
        status=Status.OK if enough else Status.WARN,
        needed=False,
        found=f"at most {allowed} ({os.cpu_count()} processors)",
        means="room for the processes of instances" if enough else "instances will fail to start processes",
        fix="" if enough else "raise LimitNPROC of the daemon and kernel.threads-max",
    )
