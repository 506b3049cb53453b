"""Whole operating systems: what may be wished for them, what QEMU is told of them, and whose keys they take."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alveole.agent.system import _nameserver
from alveole.cli import values
from alveole.cli.context import BadValueError
from alveole.cli.spec import instance_spec
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.health import HealthCheck
from alveole.model.instance import InstanceSpec, Isolation, Mount, Resources
from alveole.policy.system import check_no_system, check_system
from alveole.runtime.base import Handle
from alveole.runtime.qemu.argv import Machine, shape
from alveole.runtime.qemu.system import About, Systems, _shares_identity
from alveole.runtime.qemu.system_argv import SEED, boots_by_bios, command
from tests.runtime_world import CARD
from tests.unit.test_qemu_seed import cell

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me@here"
IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "spec.command": {"command": ("sh",)},
    "spec.entrypoint": {"entrypoint": ()},
    "spec.env": {"env": {"A": "1"}},
    "spec.user": {"user": "root"},
    "spec.workdir": {"workdir": "/"},
    "spec.mounts": {"mounts": (Mount(kind="volume", source="data", target="/data"),)},
    "spec.health": {"health": HealthCheck(command=("true",))},
    "spec.cap_add": {"cap_add": ("CAP_CHOWN",)},
    "spec.cap_drop": {"cap_drop": ("ALL",)},
    "spec.read_only": {"read_only": True},
    "spec.stop_signal": {"stop_signal": "SIGQUIT"},
    "spec.resources.pids": {"resources": Resources(pids=None)},
}
POSSIBLE: dict[str, Any] = {
    "isolation": Isolation.VM,
    "hostname": "h",
    "labels": {"a": "b"},
    "tty": True,
    "stdin": True,
    "resources": Resources(memory_bytes=1 << 30, cpus=2),
    "stop_grace_s": 5,
    "user_data": "#!/bin/sh\n",
    "ssh_keys": (KEY,),
}


def spec(**fields: Any) -> InstanceSpec:
    return InstanceSpec(image="os", **fields)


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_what_a_system_cannot_fulfil_is_refused_by_name(field: str) -> None:
    with pytest.raises(AlveoleError) as caught:
        check_system(spec(**{**POSSIBLE, **IMPOSSIBLE[field]}))
    assert (caught.value.code, caught.value.field) == (ErrorCode.UNSUPPORTED, field)
    assert "image os" in caught.value.message
    assert caught.value.hint
    check_no_system(spec(**IMPOSSIBLE[field]))


def test_what_it_can_fulfil_is_let_through() -> None:
    check_system(spec(**POSSIBLE))


@pytest.mark.parametrize(("field", "value"), [("user_data", "#!/bin/sh"), ("ssh_keys", (KEY,))])
def test_what_only_a_system_is_told_is_refused_elsewhere(field: str, value: object) -> None:
    with pytest.raises(AlveoleError) as caught:
        check_no_system(spec(**{field: value}))
    assert caught.value.field == f"spec.{field}"


def machine() -> Machine:
    common: dict[str, Any] = {"id": "0123456789ab", "memory_mib": 1024, "cpus": 1, "accelerator": "tcg", "card": CARD}
    return Machine(**common, tty=True, stdin=True, root_bytes=1 << 30, parts=(SEED,))


def test_a_system_boots_its_own_disk_and_may_reboot() -> None:
    argv = command(machine(), incoming=False)
    assert not {"-kernel", "-initrd", "-append", "-no-reboot", "-S"} & set(argv)
    assert "mem-merge=off" in argv[argv.index("-machine") + 1].split(",")
    assert "-no-reboot" in shape(machine())  # the other kind of machine ends with its instance
    (root,) = (word for word in argv if "node-name=root" in word)
    assert "size=1073741824" in root
    (seed,) = (word for word in argv if "node-name=seed" in word)
    assert "read-only=on" in seed
    (boots_from,) = (word for word in argv if "bootindex" in word)
    assert boots_from.startswith("virtio-blk-pci,id=root-device,drive=root,")
    assert any(f"mac={CARD.mac}" in word for word in argv)
    assert command(machine(), incoming=True)[: len(argv)] == argv


SECTOR = b"\xeb\x58" + bytes(508) + b"\x55\xaa"


@pytest.mark.parametrize(
    ("sector", "boots"),
    [
        (SECTOR, True),
        (bytes(440) + b"\x01" + bytes(69) + b"\x55\xaa", False),  # a partition table only, as for UEFI
        (SECTOR[:510] + b"\0\0", False),
        (SECTOR[:100], False),
        (b"", False),
    ],
)
def test_disks_without_a_boot_loader_are_known(sector: bytes, boots: bool) -> None:
    assert boots_by_bios(sector) is boots


def test_keys_are_the_lines_of_a_file() -> None:
    assert values.public_keys("--ssh-key", f"# mine\n{KEY}\n\nssh-rsa AAAA\n") == [KEY, "ssh-rsa AAAA"]
    made = instance_spec("os", (), {"ssh_keys": (f"{KEY}\n", "ssh-rsa AAAA"), "user_data": "x"}, {})
    assert InstanceSpec.model_validate(made).ssh_keys == (KEY, "ssh-rsa AAAA")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "holds no key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n", "private key"),
        ("hello", "no public key"),
    ],
)
def test_what_is_no_key_is_refused_and_never_repeated(content: str, why: str) -> None:
    with pytest.raises(BadValueError, match=why) as caught:
        values.public_keys("--ssh-key", content)
    assert "b3BlbnNz" not in caught.value.message


@given(st.text())
def test_no_key_is_more_than_a_line(text: str) -> None:
    """A second line in authorized_keys would be a key that nobody gave."""
    try:
        kept = spec(ssh_keys=(text,)).ssh_keys
    except ValidationError:
        return
    assert "\n" not in kept[0]


@pytest.mark.parametrize("key", [f"{KEY}\nssh-rsa BBBB", f"{KEY}\n"])
def test_lines_after_a_key_are_refused(key: str) -> None:
    with pytest.raises(ValidationError):
        spec(ssh_keys=(key,))


def test_its_name_server_is_the_one_of_its_network() -> None:
    assert _nameserver("nameserver 192.0.0.1\noptions ndots:0\n") == "192.0.0.1"
    assert _nameserver("") == ""


@pytest.mark.parametrize("shared", [True, False])
async def test_a_fork_shares_its_identity_until_it_boots(tmp_path: Path, *, shared: bool) -> None:
    """Also one that slept before it did; what was never forked shares it with nobody, asleep or not."""
    assert not _shares_identity(cell(tmp_path))
    assert _shares_identity(cell(tmp_path, origin=tmp_path))
    about = About(
        machine_type="pc", accelerator="tcg", processor="max", memory_mib=64, cpus=1, qemu="10", goes_on=shared
    ).replace(shares_identity=shared)
    (tmp_path / "system.json").write_bytes(about.to_json())
    asleep = tmp_path / "asleep"
    asleep.mkdir()
    handle = Handle(
        runtime="qemu",
        id="a",
        directory=str(tmp_path),
        run_directory=str(tmp_path),
        cgroup="",
        pid=1,
        pid_started=1,
        monitor_pid=1,
        monitor_started=1,
    )
    assert Systems.describe(handle)["shares_identity"] is shared
    await Systems.keep_about(handle, asleep)
    assert _shares_identity(cell(tmp_path, origin=asleep, woken=True)) is shared
    (asleep / "system.json").unlink()  # captured by a version that did not keep it
    assert not _shares_identity(cell(tmp_path, origin=asleep, woken=True))
