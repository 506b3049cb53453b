"""One machine -> the arguments of QEMU. A pure function: paths are as QEMU sees them in its jail.

All that the guest can see of a machine's beginning is its *shape*: machines of one shape can be started from what one
of them has become. What differs between them is plugged in while they run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alveole.runtime.base import Card

PROGRAM = "qemu-system-x86_64"
MACHINE_TYPE = "pc-i440fx-10.0"
"""Versioned: what the guest sees stays the same when QEMU is upgraded."""

PROCESSOR = "max"
"""All that the accelerator can offer on this host."""

PLACE = "/machine"
"""Where the jail holds what is this machine's own: files below are named here for both sides."""

CONTROL, STATUS, COMMANDS, CONSOLE, WORDS = "control", "status", "commands", "console", "words"
STATE = "state"
FILES = (STATUS, COMMANDS, CONSOLE, WORDS, STATE)
"""Regular files of QEMU: what the guest tells (two), its serial console, QEMU's last words, the state of devices."""

MONITOR = "qmp"
"""A directory, the only one that QEMU may make entries in: for its socket."""

FIFOS = (f"{CONTROL}.in", f"{CONTROL}.out")
KERNEL, INITRAMFS, MEMORY, DISKS, BINDS = "kernel", "initramfs", "memory", "disks", "binds"

ON_ERROR = "werror=report,rerror=report"
"""Of disks: the guest is told. By default, a machine whose host has no space stands still until somebody lets it on."""

_TRANSLATION_MIB = 64  # of TCG's translated code
_CARD_SLOT, _ROOT_SLOT = 6, 7  # on the PCI bus
INCOMING = ("-S", "-incoming", "defer", "-global", "migration.send-configuration=off")
_STDIN, _STDOUT, _STDERR = 3, 4, 5
# Its own standard streams are nobody's: those of the instance are passed on under other numbers, and a terminal is
# made to pass every byte as it is.
_LAUNCH = 'exec 4>&1 5>&2 {stdin} 0</dev/null >>"$1" 2>&1; shift; [ ! -t 3 ] || stty raw -echo <&3; exec "$@"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is plugged into a running machine: a raw disk below DISKS, or a directory below BINDS shared by 9p.

    The guest finds it by its ``name``, which is a disk's serial number and a directory's tag.
    """

    name: str  # at most 20 characters
    read_only: bool
    is_disk: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    id: str
    memory_mib: int
    cpus: int
    accelerator: str  # kvm | tcg
    card: Card
    tty: bool
    stdin: bool  # without tty: whether it reads its standard input
    root_bytes: int  # size of the disk that holds the root file system
    parts: tuple[Part, ...]


def command(machine: Machine, *, incoming: bool) -> tuple[str, ...]:
    """What runs in the jail: QEMU, its standard streams put where it wants them.

    ``incoming``: it does not boot, but waits for the state that it goes on from.
    """
    return (*launcher(machine), *shape(machine), *backends(machine), *(INCOMING if incoming else ()))


def launcher(machine: Machine) -> tuple[str, ...]:
    """QEMU's name, behind a shell that puts its standard streams where it wants them."""
    script = _LAUNCH.format(stdin="3<&0" if machine.stdin or machine.tty else "3</dev/null")
    return ("sh", "-c", script, "sh", f"{PLACE}/{WORDS}", PROGRAM, "-name", machine.id)


def shape(machine: Machine) -> tuple[str, ...]:
    """What the guest can see. Equal for machines of which one can go on where the other stopped."""
    return (
        *base(machine),
        "-no-reboot",
        *memory(machine),
        *_guest_system(machine),
        *_channels(machine),
        *("-device", f"virtio-net-pci,netdev=network,mac={machine.card.mac},addr={_CARD_SLOT:#x},romfile="),
        *_root_disk(machine),
    )


def backends(machine: Machine) -> tuple[str, ...]:
    """What the guest cannot see."""
    shared = (part for part in machine.parts if not part.is_disk)
    return (
        *("-qmp", f"unix:{PLACE}/{MONITOR}/socket,server=on,wait=off"),
        *("-netdev", f"tap,id=network,ifname={machine.card.device},script=no,downscript=no,vhost=off"),
        *(word for part in shared for word in ("-fsdev", _directory(part))),
    )


def base(machine: Machine) -> tuple[str, ...]:
    """The board, its processors, and what QEMU may do."""
    return board(machine.accelerator, machine.cpus)


def board(accelerator: str, cpus: int) -> tuple[str, ...]:
    """The same for the machine of no instance. The object "memory" has still to be given."""
    how = f"tcg,thread=multi,tb-size={_TRANSLATION_MIB}" if accelerator == "tcg" else accelerator
    return (
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", f"{MACHINE_TYPE},usb=off,vmport=off,mem-merge=off,memory-backend=memory"),
        *("-accel", how, "-cpu", PROCESSOR, "-smp", str(cpus)),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-action", "panic=exit-failure", "-rtc", "base=utc,clock=host"),
    )


def memory(machine: Machine) -> tuple[str, ...]:
    """A private mapping of a file: what the guest writes is this process's alone, what it reads is shared."""
    path, size = f"{PLACE}/{MEMORY}", machine.memory_mib
    backend = f"memory-backend-file,id=memory,size={size}M,mem-path={path},share=off,readonly=on,rom=off"
    return ("-m", f"{size}M", "-object", backend)


def _guest_system(machine: Machine) -> tuple[str, ...]:
    card = machine.card
    parameters = kernel_parameters(card.control_address, card.control_gateway, card.gateway_mac)
    return ("-kernel", f"{PLACE}/{KERNEL}", "-initrd", f"{PLACE}/{INITRAMFS}", "-append", parameters)


def kernel_parameters(control_address: str, control_gateway: str, gateway_mac: str) -> str:
    return (
        "console=ttyS0 quiet panic=-1 tsc=unstable no_timer_check random.trust_cpu=on mitigations=off "
        f"control_address={control_address} control_gateway={control_gateway} gateway_mac={gateway_mac}"
    )


def _channels(machine: Machine) -> tuple[str, ...]:
    return (
        *("-chardev", f"file,id=console,path={PLACE}/{CONSOLE},append=on", "-serial", "chardev:console"),
        *("-device", "virtio-rng-pci,addr=0x3", "-device", "pvpanic-pci,addr=0x4"),
        *("-device", "vmgenid,guid=auto", "-device", "virtio-serial-pci,id=ports,addr=0x5"),
        *("-chardev", f"pipe,id=control,path={PLACE}/{CONTROL}"),
        *("-device", "virtserialport,bus=ports.0,nr=1,chardev=control,name=control"),
        *("-chardev", f"file,id=status,path={PLACE}/{STATUS},append=on"),
        *("-device", "virtserialport,bus=ports.0,nr=2,chardev=status,name=status"),
        *("-chardev", f"file,id=commands,path={PLACE}/{COMMANDS},append=on"),
        *("-device", "virtserialport,bus=ports.0,nr=6,chardev=commands,name=commands"),
        *(_terminal() if machine.tty else _pipes()),
    )


def _terminal() -> tuple[str, ...]:
    return (
        *("-chardev", "serial,id=terminal,path=/dev/tty"),
        *("-device", "virtconsole,bus=ports.0,nr=3,chardev=terminal"),
    )


def _pipes() -> tuple[str, ...]:
    """A port each: one whose input has ended passes on no output either."""
    return (
        *("-add-fd", f"fd={_STDIN},set=1", "-add-fd", f"fd={_STDOUT},set=2", "-add-fd", f"fd={_STDERR},set=3"),
        *("-chardev", "file,id=stdin,path=/dev/null,input-path=/dev/fdset/1"),
        *("-device", "virtserialport,bus=ports.0,nr=3,chardev=stdin,name=stdin"),
        *("-chardev", "file,id=stdout,path=/dev/fdset/2,append=on"),
        *("-device", "virtserialport,bus=ports.0,nr=4,chardev=stdout,name=stdout"),
        *("-chardev", "file,id=stderr,path=/dev/fdset/3,append=on"),
        *("-device", "virtserialport,bus=ports.0,nr=5,chardev=stderr,name=stderr"),
    )


def _root_disk(machine: Machine) -> tuple[str, ...]:
    file = f"file.driver=file,file.filename={PLACE}/{DISKS}/root,file.locking=on"
    return (
        *("-blockdev", f"driver=raw,node-name=root,discard=unmap,size={machine.root_bytes},{file}"),
        *("-device", f"virtio-blk-pci,id=root-device,drive=root,serial=root,addr={_ROOT_SLOT:#x},{ON_ERROR}"),
    )


def _directory(part: Part) -> str:
    access = ",readonly=on" if part.read_only else ""
    return f"local,id={part.name},path={PLACE}/{BINDS}/{part.name},security_model=none{access}"


def device_id(name: str) -> str:
    """Of the device of a disk by this name."""
    return f"{name}-device"


def plug(part: Part, file: str = "", slot: int | None = None) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """The monitor's commands to plug it in. ``file``: where a disk is if not below DISKS; ``slot``: of the PCI bus."""
    if not part.is_disk:
        return (("device_add", {"driver": "virtio-9p-pci", "fsdev": part.name, "mount_tag": part.name}),)
    source = {"driver": "file", "filename": file or f"{PLACE}/{DISKS}/{part.name}", "locking": "on"}
    node = {"driver": "raw", "node-name": part.name, "discard": "unmap", "read-only": part.read_only, "file": source}
    device = {"driver": "virtio-blk-pci", "id": device_id(part.name), "drive": part.name, "serial": part.name}
    on_error = dict(word.split("=") for word in ON_ERROR.split(","))
    place = {} if slot is None else {"addr": f"{slot:#x}"}
    return (("blockdev-add", node), ("device_add", {**device, **on_error, **place}))
