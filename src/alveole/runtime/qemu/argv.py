"""One machine -> the arguments of QEMU. A pure function: paths are as QEMU sees them in its jail.

Devices have fixed addresses and disks are named block nodes, so that a machine can be cloned with other disks.
"""

from dataclasses import dataclass

from alveole.runtime.base import Card

PROGRAM = "qemu-system-x86_64"
MACHINE_TYPE = "pc-i440fx-10.0"
"""Versioned: what the guest sees stays the same when QEMU is upgraded."""

PLACE = "/machine"
"""Where the jail holds what is this machine's own: files below are named here for both sides."""

CONTROL, STATUS, COMMANDS, CONSOLE, WORDS = "control", "status", "commands", "console", "words"
FILES = (STATUS, COMMANDS, CONSOLE, WORDS)
"""Regular files that QEMU writes: what the guest tells (two), its serial console, QEMU's own last words."""

FIFOS = (f"{CONTROL}.in", f"{CONTROL}.out")
KERNEL, INITRAMFS, MEMORY, DISKS, BINDS = "kernel", "initramfs", "memory", "disks", "binds"

_TRANSLATION_MIB = 64  # of TCG's translated code
_FIRST_DISK_SLOT = 8  # on the PCI bus, after the fixed devices
_STDIN, _STDOUT, _STDERR = 3, 4, 5
# Its own standard streams are nobody's: those of the instance are passed on under other numbers, and a terminal is
# made to pass every byte as it is.
_LAUNCH = 'exec 3<&0 4>&1 5>&2 0</dev/null >>"$1" 2>&1; shift; [ ! -t 3 ] || stty raw -echo <&3; exec "$@"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A raw disk below DISKS. The guest finds it by its ``name``, which is its serial number."""

    name: str  # at most 20 characters
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """A directory of the host below BINDS, shared with the guest by 9p under the tag ``name``."""

    name: str
    read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    id: str
    memory_mib: int
    cpus: int
    accelerator: str  # kvm | tcg
    card: Card
    tty: bool
    stdin: bool  # without tty: whether it reads its standard input
    disks: tuple[Disk, ...]  # the first holds the root file system
    binds: tuple[Bind, ...] = ()


def command(machine: Machine) -> tuple[str, ...]:
    """What runs in the jail: QEMU, its standard streams put where it wants them."""
    return ("sh", "-c", _LAUNCH, "sh", f"{PLACE}/{WORDS}", PROGRAM, *arguments(machine))


def arguments(machine: Machine) -> tuple[str, ...]:
    return (
        *_base(machine),
        *_memory(machine),
        *_guest_system(machine),
        *_channels(machine),
        *_network(machine.card),
        *(word for number, disk in enumerate(machine.disks) for word in _disk(disk, _FIRST_DISK_SLOT + number)),
        *(word for bind in machine.binds for word in _bind(bind)),
    )


def _base(machine: Machine) -> tuple[str, ...]:
    accelerator = f"tcg,thread=multi,tb-size={_TRANSLATION_MIB}" if machine.accelerator == "tcg" else "kvm"
    return (
        *("-name", machine.id, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", f"{MACHINE_TYPE},usb=off,vmport=off,memory-backend=memory"),
        *("-accel", accelerator, "-cpu", "max", "-smp", str(machine.cpus)),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-action", "panic=exit-failure", "-rtc", "base=utc,clock=host"),
    )


def _memory(machine: Machine) -> tuple[str, ...]:
    """A private mapping of a file: what the guest writes is this process's alone, what it reads is shared."""
    path, size = f"{PLACE}/{MEMORY}", machine.memory_mib
    backend = f"memory-backend-file,id=memory,size={size}M,mem-path={path},share=off,readonly=on,rom=off"
    return ("-m", f"{size}M", "-object", backend)


def _guest_system(machine: Machine) -> tuple[str, ...]:
    card = machine.card
    parameters = (
        "console=ttyS0 quiet panic=-1 tsc=unstable no_timer_check random.trust_cpu=on mitigations=off "
        f"control_address={card.control_address} control_gateway={card.control_gateway} gateway_mac={card.gateway_mac}"
    )
    return ("-kernel", f"{PLACE}/{KERNEL}", "-initrd", f"{PLACE}/{INITRAMFS}", "-append", parameters)


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
        *(_terminal() if machine.tty else _pipes(stdin=machine.stdin)),
    )


def _terminal() -> tuple[str, ...]:
    return (
        *("-chardev", "serial,id=terminal,path=/dev/tty"),
        *("-device", "virtconsole,bus=ports.0,nr=3,chardev=terminal"),
    )


def _pipes(*, stdin: bool) -> tuple[str, ...]:
    """A port each: one whose input has ended passes on no output either."""
    source = "/dev/fdset/1" if stdin else "/dev/null"
    return (
        *("-add-fd", f"fd={_STDIN},set=1", "-add-fd", f"fd={_STDOUT},set=2", "-add-fd", f"fd={_STDERR},set=3"),
        *("-chardev", f"file,id=stdin,path=/dev/null,input-path={source}"),
        *("-device", "virtserialport,bus=ports.0,nr=3,chardev=stdin,name=stdin"),
        *("-chardev", "file,id=stdout,path=/dev/fdset/2,append=on"),
        *("-device", "virtserialport,bus=ports.0,nr=4,chardev=stdout,name=stdout"),
        *("-chardev", "file,id=stderr,path=/dev/fdset/3,append=on"),
        *("-device", "virtserialport,bus=ports.0,nr=5,chardev=stderr,name=stderr"),
    )


def _network(card: Card) -> tuple[str, ...]:
    return (
        *("-netdev", f"tap,id=network,ifname={card.device},script=no,downscript=no,vhost=off"),
        *("-device", f"virtio-net-pci,netdev=network,mac={card.mac},addr=0x6,romfile="),
    )


def _disk(disk: Disk, slot: int) -> tuple[str, ...]:
    node = f"driver=raw,node-name={disk.name},discard=unmap,file.driver=file,file.filename={PLACE}/{DISKS}/{disk.name}"
    access = "on" if disk.read_only else "off"
    return (
        *("-blockdev", f"{node},read-only={access},file.locking=off"),
        *("-device", f"virtio-blk-pci,drive={disk.name},serial={disk.name},addr={slot:#x}"),
    )


def _bind(bind: Bind) -> tuple[str, ...]:
    access = ",readonly=on" if bind.read_only else ""
    return (
        *("-fsdev", f"local,id={bind.name},path={PLACE}/{BINDS}/{bind.name},security_model=none{access}"),
        *("-device", f"virtio-9p-pci,fsdev={bind.name},mount_tag={bind.name}"),
    )
