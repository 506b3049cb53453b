"""A machine whose root disk is a whole operating system -> the arguments of QEMU. A pure function.

It differs from a machine that runs an OCI image (argv.py) in what it boots: its own boot loader, by SeaBIOS. Nothing is
plugged in later, and nothing inside is ours: it is told of by its serial console alone.
"""

from alveole.runtime.qemu.argv import DISKS, INCOMING, ON_ERROR, PLACE, Machine, Part, backends, base, launcher, memory

SEED = Part(name="seed", read_only=True, is_disk=True)
"""The disk that a system reads at its first boot."""


_CODE_BYTES, _SECTOR_BYTES, _SIGNATURE = 440, 512, b"\x55\xaa"


def boots_by_bios(sector: bytes) -> bool:
    """Whether the first sector of a disk holds anything to start. That of one for UEFI alone is marked, and empty."""
    return sector[_SECTOR_BYTES - 2 : _SECTOR_BYTES] == _SIGNATURE and any(sector[:_CODE_BYTES])


def command(machine: Machine, *, incoming: bool) -> tuple[str, ...]:
    """What runs in the jail: QEMU, its serial port on the jail's terminal.

    ``incoming``: it does not boot, but waits for the state that it goes on from.
    """
    return (
        *launcher(machine),
        *base(machine),
        *memory(machine),
        *_devices(machine),
        *backends(machine),
        *(INCOMING if incoming else ()),
    )


def _devices(machine: Machine) -> tuple[str, ...]:
    """Disks and a card of kinds that Linux has known since 2008; a source of randomness, and who tells of panics."""
    return (
        *("-chardev", "serial,id=terminal,path=/dev/tty", "-serial", "chardev:terminal"),
        *("-device", "virtio-rng-pci,addr=0x3", "-device", "pvpanic-pci,addr=0x4", "-device", "vmgenid,guid=auto"),
        *("-device", f"virtio-net-pci,netdev=network,mac={machine.card.mac},addr=0x6,romfile="),
        *_disk("root", 0x7, f"discard=unmap,size={machine.root_bytes}", ",bootindex=0"),
        *_disk(SEED.name, 0x8, "read-only=on", ""),
    )


def _disk(name: str, slot: int, access: str, boot: str) -> tuple[str, ...]:
    file = f"file.driver=file,file.filename={PLACE}/{DISKS}/{name},file.locking=on"
    return (
        *("-blockdev", f"driver=raw,node-name={name},{access},{file}"),
        *("-device", f"virtio-blk-pci,id={name}-device,drive={name},serial={name},addr={slot:#x},{ON_ERROR}{boot}"),
    )
