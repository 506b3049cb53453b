"""The seed: what the guest of a machine is told it shall be."""

import io
import json
import shlex
import tarfile
from pathlib import Path
from typing import Any

from alveole.model.instance import Resources
from alveole.runtime.base import Cell, CellMount, Ids, Process
from alveole.runtime.qemu import seed
from tests.unit.test_qemu_argv import CARD

PUBLIC_KEY = "ssh-ed25519 AAAA it\n"
BOOT_ID = "01234567-89ab-4cde-8f01-23456789abcd"
NO_MOUNTS = seed.plan((), ())


def cell(directory: Path, **changes: Any) -> Cell:
    defaults: dict[str, Any] = {
        "id": "0123456789ab",
        "directory": directory,
        "run_directory": directory,
        "log_path": directory / "log",
        "hostname": "web",
        "process": Process(args=("serve",), env={"WORD": "a b"}, workdir="/srv", uid=7, gid=8),
        "root": None,
        "read_only": False,
        "ids": Ids(base=1 << 28),
        "user_namespace": directory / "user",
        "network_namespace": directory / "net",
        "cgroup": "alveole-1a2b3c4d/0123456789ab",
        "resources": Resources(memory_bytes=1 << 28, pids=9),
        "card": CARD,
    }
    return Cell(**{**defaults, **changes})


def opened(made: Cell, how: seed.Plan) -> dict[str, bytes]:
    return members_of(seed.make_seed(made, how, public_key=PUBLIC_KEY, boot_id=BOOT_ID))


def renewed(made: Cell) -> dict[str, bytes]:
    return members_of(seed.make_renewal(made, NO_MOUNTS, public_key=PUBLIC_KEY, boot_id=BOOT_ID))


def members_of(content: bytes) -> dict[str, bytes]:
    data = io.BytesIO(content)
    with tarfile.open(fileobj=data) as archive:
        assert all(member.isreg() for member in archive)
        return {name: _content(archive, name) for name in archive.getnames()}


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file
    return file.read()


def script(made: Cell) -> list[str]:
    return opened(made, NO_MOUNTS)["setup"].decode().splitlines()


def test_mounts_reach_the_guest_as_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    mounts = (
        CellMount(target="/v", source=tmp_path / "v.img", disk=True, read_only=True),
        CellMount(target="/etc/hosts", source=file),
        CellMount(target="/b", source=tmp_path),
        CellMount(target="/t", source=None, size_bytes=1 << 20),
    )
    how = seed.plan(mounts, {file})
    assert [(name, mount.target) for name, mount in how.disks] == [("vv", "/v")]
    assert [(name, mount.target) for name, mount in how.files] == [("file1", "/etc/hosts")]
    assert [(name, mount.target) for name, mount in how.binds] == [("bind2", "/b")]
    assert [mount.target for mount in how.tmpfs] == ["/t"]
    members = opened(cell(tmp_path, mounts=mounts), how)
    assert members["file/file1"] == b"content"
    config = json.loads(members["config.json"])
    sources = {mount["destination"]: mount["source"] for mount in config["mounts"]}
    assert sources["/v"] == "/disks/vv"
    assert sources["/etc/hosts"] == "/run/seed/file/file1"
    assert sources["/b"] == "/disks/bind2"
    lines = members["setup"].decode()
    assert 'mount -t ext4 -o ro "$(disk vv)" /disks/vv' in lines
    assert "directory bind2 trans=virtio" in lines
    assert str(tmp_path) not in members["config.json"].decode() + lines  # no path of the host's


def test_the_bundle_is_of_the_guests_kernel(tmp_path: Path) -> None:
    """Neither the host's ids nor its namespaces or cgroups mean anything there; who the process is does."""
    config = json.loads(opened(cell(tmp_path), NO_MOUNTS)["config.json"])
    kinds = {namespace["type"]: namespace for namespace in config["linux"]["namespaces"]}
    assert "user" not in kinds
    assert "network" not in kinds  # the machine's own is all that is there
    assert not any("path" in namespace for namespace in kinds.values())
    assert not config["linux"].get("uidMappings")
    assert config["root"]["path"] == "/instance/root"
    user = config["process"]["user"]
    assert (user["uid"], user["gid"], config["process"]["cwd"]) == (7, 8, "/srv")
    assert "WORD=a b" in config["process"]["env"]
    resources = config["linux"]["resources"]
    assert resources["pids"]["limit"] == 9
    assert "limit" not in resources.get("memory", {})  # all that the machine has is the instance's


def test_without_a_network_the_instance_does_not_see_the_card(tmp_path: Path) -> None:
    made = cell(tmp_path, card=CARD.replace(has_route=False))
    config = json.loads(opened(made, NO_MOUNTS)["config.json"])
    assert {"type": "network"} in config["linux"]["namespaces"]
    assert not any("route" in line for line in script(made))
    assert any(f"ip route add default via {CARD.gateway}" in line for line in script(cell(tmp_path)))


def test_a_name_cannot_become_a_command_of_the_guests(tmp_path: Path) -> None:
    name = "web; poweroff -f #"
    (line,) = (line for line in script(cell(tmp_path, hostname=name)) if line.startswith("hostname"))
    assert shlex.split(line) == ["hostname", name]


def test_the_key_that_lets_in_is_the_machines(tmp_path: Path) -> None:
    members = opened(cell(tmp_path), NO_MOUNTS)
    assert members["authorized_keys"].decode() == PUBLIC_KEY
    assert script(cell(tmp_path))[0].startswith("cp /run/seed/authorized_keys")


def test_a_file_that_grew_too_large_is_cut(tmp_path: Path) -> None:
    """Those that are passed are ours and small; a bound all the same."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * (3 << 20))
    mount = CellMount(target="/f", source=file)
    members = opened(cell(tmp_path, mounts=(mount,)), seed.plan((mount,), {file}))
    assert len(members["file/file0"]) == 1 << 20


def test_the_instance_sees_a_boot_id_that_can_be_renewed(tmp_path: Path) -> None:
    """Where /proc has that of the kernel, which all clones of one moment would have in common."""
    members = opened(cell(tmp_path), NO_MOUNTS)
    assert members["boot-id"].decode() == f"{BOOT_ID}\n"
    mounts = json.loads(members["config.json"])["mounts"]
    targets = [mount["destination"] for mount in mounts]
    assert targets.index("/proc") < targets.index("/proc/sys/kernel/random/boot_id")
    assert mounts[targets.index("/proc/sys/kernel/random/boot_id")]["source"] == "/run/seed/boot-id"


def test_a_fork_renews_who_it_is_and_what_wakes_does_not(tmp_path: Path) -> None:
    fork = renewed(cell(tmp_path, origin=tmp_path))
    woken = renewed(cell(tmp_path, origin=tmp_path, woken=True))
    script, same = fork["renew"].decode(), woken["renew"].decode()
    for own in ("boot-id", "machine-id", "ssh_host_"):
        assert own in script
        assert own not in same
    assert fork["boot-id"].decode() == f"{BOOT_ID}\n"
    assert set(same.splitlines()) < set(script.splitlines())  # name, how it is reached, and the key that lets in
    assert "hostname web" in same
    assert "authorized_keys" in same


def test_a_fork_has_the_address_that_it_is_given(tmp_path: Path) -> None:
    """Where that is another than its guest has; one without a network has none."""
    script = renewed(cell(tmp_path, origin=tmp_path))["renew"].decode()
    assert f'$4 != "{CARD.address}/32"' in script
    assert f"ip address add {CARD.address}/32 dev eth0" in script
    alone = renewed(cell(tmp_path, origin=tmp_path, card=CARD.replace(has_route=False)))["renew"].decode()
    assert "ip address" not in alone
