"""Whether machines can boot on this host: one is booted with each accelerator, by itself, until its guest is ready.

It has the kernel, initramfs and board of the machines that instances run in, and neither disk nor network. The guest
is ours from the first instruction to the last, so its QEMU needs no jail.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alveole.host.blocking import in_thread
from alveole.host.probe.finding import Finding, Status, needs_root
from alveole.host.process import environment, kill_group
from alveole.model.error import AlveoleError
from alveole.runtime.qemu.argv import CONSOLE, CONTROL, PROGRAM, STATUS, WORDS, board, kernel_parameters
from alveole.runtime.qemu.boot import Boot, BootFiles
from alveole.runtime.qemu.guest import Guest

ACCELERATORS = ("kvm", "tcg")
DEADLINE_S = 20.0
SLOW_S = 5.0  # no processor that runs a guest's kernel by itself takes so long
_MEMORY_MIB = 128
_ADDRESSES = {"control_address": "169.254.0.2", "control_gateway": "169.254.0.1", "gateway_mac": "02:00:00:00:00:03"}
_KVM = Path("/dev/kvm")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one boot: how long it took, or why there was none."""

    boot_s: float | None
    failure: str = ""


async def machine_findings(
    deadline_s: float = DEADLINE_S, accelerators: tuple[str, ...] = ACCELERATORS
) -> tuple[Finding, ...]:
    """One for each accelerator, tried in turn. Takes at most ``deadline_s`` for each, and leaves nothing."""
    if skipped := needs_root("machine", needed=False):
        return (skipped,)
    with tempfile.TemporaryDirectory(prefix="alveole-selftest-") as name:
        directory = Path(name)
        outcomes: dict[str, Outcome] = {}
        try:
            boot = await BootFiles(directory).ensure()
            for accelerator in accelerators:
                outcomes[accelerator] = await _attempt(accelerator, boot, directory, deadline_s)
        except AlveoleError as error:
            hint = f" ({error.hint})" if error.hint else ""
            outcomes = {accelerator: Outcome(None, f"{error.message}{hint}") for accelerator in accelerators}
    return judge(outcomes)


async def _attempt(accelerator: str, boot: Boot, parent: Path, deadline_s: float) -> Outcome:
    if not shutil.which(PROGRAM):
        return Outcome(None, f"{PROGRAM} is not installed")
    if accelerator == "kvm" and not _KVM.exists():
        return Outcome(None, f"there is no {_KVM}")
    place = parent / accelerator
    place.mkdir()
    return await _boot(accelerator, boot, place, deadline_s)


async def _boot(accelerator: str, boot: Boot, place: Path, deadline_s: float) -> Outcome:
    began = time.monotonic()
    with (place / WORDS).open("wb") as words:
        machine = await asyncio.create_subprocess_exec(
            *command(accelerator, boot, place),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            env=environment(),
            start_new_session=True,
        )
    try:
        alive = lambda: machine.returncode is None  # noqa: E731
        await Guest(place).until(lambda told: told.is_waiting, alive=alive, timeout_s=deadline_s)
    except AlveoleError as error:
        words_said = await in_thread((place / WORDS).read_text)
        first, _, _ = words_said.strip().partition("\n")
        return Outcome(None, f"{error.message}: {first}" if first else error.message)
    else:
        return Outcome(time.monotonic() - began)
    finally:
        kill_group(machine.pid)
        await machine.wait()


def command(accelerator: str, boot: Boot, place: Path) -> tuple[str, ...]:
    """QEMU's arguments; what the guest tells is written into ``place``. Pure."""
    memory = f"memory-backend-ram,id=memory,size={_MEMORY_MIB}M"
    return (
        *(PROGRAM, *board(accelerator, cpus=1), "-no-reboot", "-m", f"{_MEMORY_MIB}M", "-object", memory),
        *("-kernel", str(boot.kernel.image), "-initrd", str(boot.initramfs)),
        *("-append", kernel_parameters(**_ADDRESSES)),
        *("-chardev", f"file,id=console,path={place}/{CONSOLE}", "-serial", "chardev:console"),
        *("-device", "virtio-serial-pci", "-chardev", "null,id=control"),
        *("-device", f"virtserialport,chardev=control,name={CONTROL}"),
        *("-chardev", f"file,id=status,path={place}/{STATUS}"),
        *("-device", f"virtserialport,chardev=status,name={STATUS}"),
        *("-device", "virtserialport,name=commands"),
    )


def judge(outcomes: Mapping[str, Outcome]) -> tuple[Finding, ...]:
    """One finding for each accelerator tried. Only a host on which none boots a machine lacks something."""
    works = any(outcome.boot_s is not None for outcome in outcomes.values())
    return tuple(_finding(accelerator, outcome, works=works) for accelerator, outcome in outcomes.items())


def _finding(accelerator: str, outcome: Outcome, *, works: bool) -> Finding:
    is_slow = accelerator == "kvm" and outcome.boot_s is not None and outcome.boot_s > SLOW_S
    booted = outcome.boot_s is not None
    found = f"a machine booted in {outcome.boot_s:.1f} s" if booted else f"no machine booted: {outcome.failure}"
    if booted and not is_slow:
        means = "the processor itself runs the guest" if accelerator == "kvm" else "QEMU interprets the guest"
        return Finding(name=f"boot {accelerator}", status=Status.OK, needed=True, found=found, means=means)
    return Finding(
        name=f"boot {accelerator}",
        status=Status.WARN if works else Status.MISSING,
        needed=True,
        found=f"{found}, as if emulated" if is_slow else found,
        means=_meaning(accelerator, works=works),
        fix="the lines about kvm and qemu-system-x86_64 say what can be done; on a busy host, look again later",
    )


def _meaning(accelerator: str, *, works: bool) -> str:
    if not works:
        return "no virtual machine came up in that time; containers and sandboxes are not concerned"
    if accelerator == "kvm":
        return "this host has no KVM, or emulates it: virtual machines are interpreted by QEMU, several times slower"
    return "virtual machines run by KVM alone: --accel tcg cannot be used"
