"""What comes before the partition of a disk that boots, as a BIOS, GRUB and the kernel read it."""

import struct

import pytest

from alveole.image.system_disk import FIRST_BYTES, boot_area
from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.qemu.system_argv import boots_by_bios

BOOT = bytes(range(1, 255)) * 2 + b"\0\0\x55\xaa"
CORE = b"core" * 20_000


def test_one_active_partition_takes_all_the_rest() -> None:
    size_bytes = 4 << 30
    area = boot_area(BOOT, CORE, size_bytes=size_bytes, disk_id=b"ABCD")
    status, kind, first, sectors = struct.unpack_from("<B3xB3xII", area, 446)
    assert (status, kind) == (0x80, 0x83)
    assert first * 512 == FIRST_BYTES
    assert (first + sectors) * 512 == size_bytes
    assert area[462:510] == bytes(48)
    assert area[440:446] == b"ABCD\0\0"


def test_the_code_lies_where_it_looks_for_itself() -> None:
    area = boot_area(BOOT, CORE, size_bytes=1 << 30, disk_id=bytes(4))
    assert area[:440] == BOOT[:440]
    assert area[512:] == CORE
    assert boots_by_bios(area[:512])
    assert len(area) <= FIRST_BYTES


def test_the_largest_disk_has_a_table_that_holds_its_size() -> None:
    area = boot_area(BOOT, CORE, size_bytes=((2 << 20) - 1) << 20, disk_id=bytes(4))
    assert struct.unpack_from("<II", area, 454) == (2048, (1 << 32) - 4096)


@pytest.mark.parametrize(
    ("boot", "core", "said"),
    [
        (b"", CORE, "no boot sector"),
        (BOOT[:-1], CORE, "no boot sector"),
        (bytes(512), CORE, "no boot sector"),
        (BOOT, b"", "0 bytes"),
        (BOOT, bytes(FIRST_BYTES - 511), "room for 1 to"),
    ],
)
def test_a_system_without_its_boot_loader_is_refused(boot: bytes, core: bytes, said: str) -> None:
    with pytest.raises(AlveoleError, match=said) as caught:
        boot_area(boot, core, size_bytes=1 << 30, disk_id=bytes(4))
    assert caught.value.code is ErrorCode.INVALID
