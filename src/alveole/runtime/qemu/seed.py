"""One cell -> the seed of a machine's guest: an archive with the instance's OCI bundle and a script that sets it up.

The script runs in the guest, after the point at which a machine can be frozen and cloned.
"""

import io
import json
import shlex
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alveole.model.instance import Resources
from alveole.runtime import bundle
from alveole.runtime.base import COPIED_FILE_BYTES, Card, Cell, CellMount

ROOT = "/instance/root"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
"""The guest's kernel draws it once, and cannot be told to draw anew: the instance sees a file of ours in its place."""

# Who a system is to others: two that have the same would be taken for one.
_RENEW_FILES = (
    # In place, and at once: whoever reads it never finds it empty.
    "dd if=/run/renewal/boot-id of=/run/seed/boot-id conv=notrunc 2>/dev/null",
    f"if [ -s {ROOT}/etc/machine-id ]; then tr -d - </proc/sys/kernel/random/uuid >{ROOT}/etc/machine-id; fi",
    f"if ls {ROOT}/etc/ssh/ssh_host_*_key >/dev/null 2>&1; then rm -f {ROOT}/etc/ssh/ssh_host_*",
    "crun --root /run/crun --cgroup-manager=cgroupfs exec instance ssh-keygen -A; fi",
)
_SEED = "/run/seed"
_MODES = {"authorized_keys": 0o600, "boot-id": 0o444}
_ENGINE = bundle.Engine(host_kernel=True, read_only_option="rro")
_LIMITS = bundle.HostLimits(open_files=1 << 20, swap_limit=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a cell's mounts reach its guest."""

    disks: tuple[tuple[str, CellMount], ...]  # serial number, what it holds
    binds: tuple[tuple[str, CellMount], ...]  # 9p tag, directory
    files: tuple[tuple[str, CellMount], ...]  # name in the seed, file
    tmpfs: tuple[CellMount, ...]


def disk_name(volume_id: str) -> str:
    """The serial number of a volume's disk, which is a file named after the volume."""
    return f"v{volume_id}"[:20]


def plan(mounts: Collection[CellMount], single_files: Collection[Path]) -> Plan:
    """``single_files`` are those sources that are no directories: their content is passed, once."""
    numbered = list(enumerate(mounts))
    disks = tuple((disk_name(mount.source.stem), mount) for mount in mounts if mount.disk and mount.source)
    others = [(number, mount) for number, mount in numbered if not mount.disk and mount.source is not None]
    return Plan(
        disks=disks,
        binds=tuple((f"bind{number}", mount) for number, mount in others if mount.source not in single_files),
        files=tuple((f"file{number}", mount) for number, mount in others if mount.source in single_files),
        tmpfs=tuple(mount for mount in mounts if mount.source is None and not mount.disk),
    )


def make_seed(cell: Cell, how: Plan, *, public_key: str, boot_id: str) -> bytes:
    """A tar archive. ``boot_id`` is a UUID that no other boot has. Blocks on reading the files of ``how``."""
    members = {f"file/{name}": _read(mount) for name, mount in how.files}
    return _archive(
        {
            "config.json": json.dumps(_config(cell, how)).encode(),
            "setup": _script(cell, how).encode(),
            "authorized_keys": public_key.encode(),
            "boot-id": f"{boot_id}\n".encode(),
            **members,
        }
    )


def make_renewal(cell: Cell, how: Plan, *, public_key: str, boot_id: str) -> bytes:
    """Like ``make_seed``, for the guest of a machine that went on from what another was: what must be its own now.

    One that was only woken is told what may have changed meanwhile: how it is reached.
    """
    lines = [
        "cp /run/renewal/authorized_keys /root/.ssh/authorized_keys",
        f"hostname {shlex.quote(cell.hostname)}",
        f'nsenter -t "$(cat /run/pid)" -u hostname {shlex.quote(cell.hostname)}',
        # In place: the instance has these files mounted.
        *(f"cat /run/renewal/file/{name} >{_SEED}/file/{name}" for name, _ in how.files),
        *(() if cell.woken else _RENEW_FILES),
        *(_network_again(cell.card) if cell.card is not None and cell.card.has_route else ()),
    ]
    script = "".join(f"{line}\n" for line in lines)
    members = {f"file/{name}": _read(mount) for name, mount in how.files}
    own = {"authorized_keys": public_key.encode(), "boot-id": f"{boot_id}\n".encode()}
    return _archive({"renew": script.encode(), **own, **members})


def _read(mount: CellMount) -> bytes:
    assert mount.source is not None  # noqa: S101  (of a Plan's files)
    with mount.source.open("rb") as file:
        return file.read(COPIED_FILE_BYTES)


def _archive(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), _MODES.get(name, 0o644)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _config(cell: Cell, how: Plan) -> dict[str, Any]:
    boot_id = CellMount(target=BOOT_ID, source=Path(f"{_SEED}/boot-id"), read_only=True)
    inside = replace(
        cell,
        root=Path(ROOT),
        mounts=(
            *(replace(mount, source=Path(f"/disks/{name}"), disk=False) for name, mount in how.disks),
            *(replace(mount, source=Path(f"/disks/{name}")) for name, mount in how.binds),
            *(replace(mount, source=Path(f"{_SEED}/file/{name}")) for name, mount in how.files),
            *how.tmpfs,
            boot_id,
        ),
        ids=None,
        user_namespace=None,
        network_namespace=None,
        cgroup="instance",
        resources=Resources(pids=cell.resources.pids),
        block_device="",
    )
    files = frozenset({Path(f"{_SEED}/boot-id"), *(Path(f"{_SEED}/file/{name}") for name, _ in how.files)})
    config = bundle.bundle(inside, _ENGINE, _LIMITS, {}, files)
    if cell.card is None or not cell.card.has_route:
        config["linux"]["namespaces"].append({"type": "network"})  # it must not see the card either
    return config


def _script(cell: Cell, how: Plan) -> str:
    lines = ["cp /run/seed/authorized_keys /root/.ssh/authorized_keys", f"hostname {shlex.quote(cell.hostname)}"]
    if cell.card is not None and cell.card.has_route:
        lines += _network(cell.card)
    lines += [f"mkdir -p {ROOT}", f'mount -t ext4 "$(disk root)" {ROOT}']
    for name, mount in how.disks:
        options = "ro" if mount.read_only else "rw"
        lines += [f"mkdir -p /disks/{name}", f'mount -t ext4 -o {options} "$(disk {name})" /disks/{name}']
        lines.append(f"echo {shlex.quote(mount.target)} >/run/targets/{name}")
    for name, _ in how.binds:
        options = "trans=virtio,version=9p2000.L,msize=262144,cache=none"
        lines += [f"mkdir -p /disks/{name}", f"directory {name} {options} /disks/{name}"]
    return "".join(f"{line}\n" for line in lines)


def _network_again(card: Card) -> list[str]:
    """Of one that sees its own address, which is another now; what all see stays as it is."""
    others = f"""ip -4 -o address show dev eth0 | awk '$5 != "peer" && $4 != "{card.address}/32" {{print $4}}'"""
    return [
        f'if [ -n "$({others})" ]; then',
        f'for other in $({others}); do ip address del "$other" dev eth0; done',
        *_network(card),
        "fi",
    ]


def _network(card: Card) -> list[str]:
    """Neighbours are permanent: nothing in a machine's namespace asks or answers who has an address."""
    return [
        f"ip address add {card.address}/32 dev eth0",
        f"ip route add {card.gateway}/32 dev eth0 src {card.address}",
        f"arp -i eth0 -s {card.gateway} {card.gateway_mac}",
        f"ip route add default via {card.gateway} dev eth0 src {card.address}",
    ]
