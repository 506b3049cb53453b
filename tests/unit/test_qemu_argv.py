"""QEMU's arguments: what the guest sees is apart from what it does not, and nothing of a user's reaches them."""

from dataclasses import replace
from typing import Any

import pytest

from alveole.runtime.base import Card
from alveole.runtime.qemu.argv import Machine, Part, backends, command, launcher, plug, shape

CARD = Card(
    device="tap0",
    mac="02:00:00:00:00:04",
    address="192.0.0.2",
    gateway="192.0.0.1",
    gateway_mac="02:00:00:00:00:03",
    control_address="169.254.0.2",
    control_gateway="169.254.0.1",
    has_route=True,
)
MACHINE = Machine(
    id="0123456789ab",
    memory_mib=512,
    cpus=2,
    accelerator="tcg",
    card=CARD,
    tty=False,
    stdin=False,
    root_bytes=1 << 30,
    parts=(),
)
DISK = Part(name="disk0", read_only=False, is_disk=True)
DIRECTORY = Part(name="bind1", read_only=True, is_disk=False)


def test_two_machines_of_one_kind_have_one_shape() -> None:
    """What differs is plugged in later, or told by the seed."""
    others: tuple[dict[str, Any], ...] = (
        {"id": "ba9876543210"},
        {"stdin": True},
        {"parts": (DISK, DIRECTORY)},
        {"card": CARD.replace(has_route=False)},
        {"card": CARD.replace(device="tap9")},
    )
    for changes in others:
        assert shape(replace(MACHINE, **changes)) == shape(MACHINE), changes


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_mib": 513},
        {"cpus": 1},
        {"accelerator": "kvm"},
        {"tty": True},
        {"root_bytes": 2 << 30},
        {"card": CARD.replace(mac="02:00:00:00:00:05")},
        {"card": CARD.replace(control_address="169.254.0.3")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_guest_has_seen_makes_another_shape(changes: dict[str, Any]) -> None:
    assert shape(replace(MACHINE, **changes)) != shape(MACHINE)


def test_one_that_goes_on_differs_by_its_end_only() -> None:
    boots, goes_on = command(MACHINE, incoming=False), command(MACHINE, incoming=True)
    assert goes_on[: len(boots)] == boots
    assert "-incoming" in goes_on
    assert "-incoming" not in boots


def test_nothing_is_there_that_was_not_asked_for() -> None:
    words = command(MACHINE, incoming=False)
    assert {"-nodefaults", "-no-user-config"} <= set(words)
    sandbox = words[words.index("-sandbox") + 1].split(",")
    assert {"on", "elevateprivileges=deny", "spawn=deny", "resourcecontrol=deny", "obsolete=deny"} == set(sandbox)
    assert not {"-monitor", "-vnc", "-gdb", "-s", "-daemonize", "-usb"} & set(words)
    assert all("script=no,downscript=no" in word for word in words if word.startswith("tap,"))


def test_a_guest_that_panics_ends_and_one_that_restarts_too() -> None:
    words = shape(MACHINE)
    assert "-no-reboot" in words
    assert words[words.index("-action") + 1] == "panic=exit-failure"
    assert any(word.startswith("pvpanic") for word in words)


def test_memory_is_private_to_the_machine() -> None:
    """Nor does the kernel merge what two happen to have in common: one could tell by the time that a write takes."""
    words = shape(MACHINE)
    (backend,) = (word for word in words if word.startswith("memory-backend-file"))
    assert {"share=off", "readonly=on"} <= set(backend.split(","))
    assert "mem-merge=off" in words[words.index("-machine") + 1].split(",")


def test_input_is_read_only_by_one_that_takes_it() -> None:
    """Else the monitor's standard input, which may be anybody's, is closed to it."""
    closed = "3</dev/null"
    assert closed in launcher(MACHINE)[2]
    assert closed not in launcher(replace(MACHINE, stdin=True))[2]
    assert closed not in launcher(replace(MACHINE, tty=True))[2]


def test_a_read_only_disk_or_directory_is_so_for_qemu_too() -> None:
    """Not by the guest's word alone."""
    for read_only in (False, True):
        machine = replace(MACHINE, parts=(replace(DIRECTORY, read_only=read_only),))
        (device,) = (word for word in backends(machine) if word.startswith("local,"))
        assert device.endswith(",readonly=on") == read_only
        node = dict(plug(replace(DISK, read_only=read_only)))["blockdev-add"]
        assert node["read-only"] is read_only


def test_a_guest_is_told_when_its_host_has_no_space() -> None:
    """Else QEMU stops it, and nobody would let it go on."""
    (root,) = (word for word in shape(MACHINE) if word.startswith("virtio-blk-pci"))
    assert {"werror=report", "rerror=report"} <= set(root.split(","))
    device = dict(plug(DISK))["device_add"]
    assert device["werror"] == device["rerror"] == "report"


def test_parts_are_plugged_in_under_names_of_ours() -> None:
    disk, directory = dict(plug(DISK)), dict(plug(DIRECTORY))
    assert disk["device_add"]["serial"] == disk["blockdev-add"]["node-name"] == DISK.name
    assert disk["blockdev-add"]["file"]["filename"] == f"/machine/disks/{DISK.name}"
    assert directory["device_add"]["mount_tag"] == DIRECTORY.name
    assert "blockdev-add" not in directory
