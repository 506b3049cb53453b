"""Who this daemon is on this host. Every host-global name derives from the state directory's id."""

import fcntl
import hashlib
import ipaddress
import json
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alveole.model.error import exhausted

CLAIMS = Path("/run/alveole-claims")
"""One file per daemon on this host, so that two of them never choose the same id window or address pool."""

UID_WINDOW_SIZE = 1 << 28  # 4096 ranges of 65536 ids
_WINDOWS = range(1, 15)  # the 32-bit id space in such windows, the first (host users) and last left out
_POOLS = range(64, 192)  # second byte of 10.x.0.0/16


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    id: str  # 8 hex digits
    state: Path
    run: Path
    uid_base: int  # first id of this daemon's window of UID_WINDOW_SIZE
    pool: ipaddress.IPv4Network  # a /16; its first address is the gateway and DNS server of all instances

    @property
    def table(self) -> str:
        """Our nftables table, family inet."""
        return f"alveole_{self.id}"

    @property
    def cgroup(self) -> str:
        """Parent of all instances' cgroups, below each hierarchy's mount."""
        return f"alveole-{self.id}"

    @property
    def interface_prefix(self) -> str:
        """Begins the name of every network device we make; at most 9 characters follow."""
        return f"av{self.id[:4]}"

    @property
    def gateway(self) -> str:
        return str(self.pool[1])


def load_identity(state: Path, run: Path) -> Identity:
    """Read the identity of a state directory, or choose and claim one the first time.

    Raises AlveoleError(EXHAUSTED) if 14 daemons have claimed all id windows of this host.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o711)
    run.mkdir(parents=True, exist_ok=True, mode=0o711)
    CLAIMS.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = state / "host.json"
    with (CLAIMS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        data = json.loads(path.read_text()) if path.exists() else _choose(secrets.token_hex(4), _claimed())
        if not path.exists():
            _write_durably(path, json.dumps(data))
        (CLAIMS / data["id"]).write_text(json.dumps({**data, "state": str(state)}))
    return Identity(
        id=data["id"],
        state=state,
        run=run,
        uid_base=data["window"] * UID_WINDOW_SIZE,
        pool=ipaddress.IPv4Network(data["pool"]),
    )


def _claimed() -> list[dict[str, Any]]:
    """Claims of daemons whose state directory still exists; claims of vanished ones are removed."""
    claims = []
    for path in CLAIMS.iterdir():
        if path.name == "lock":
            continue
        claim = json.loads(path.read_text())
        if Path(claim["state"], "host.json").exists():
            claims.append(claim)
        else:
            path.unlink()
    return claims


def _choose(identifier: str, claims: Collection[dict[str, Any]]) -> dict[str, Any]:
    start = int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:4])
    windows = {claim["window"] for claim in claims}
    pools = {claim["pool"] for claim in claims}
    window = next((w for w in _rotated(_WINDOWS, start) if w not in windows), None)
    pool = next((p for p in (f"10.{b}.0.0/16" for b in _rotated(_POOLS, start)) if _free(p) and p not in pools), None)
    if window is None or pool is None:
        raise exhausted(
            "this host has no free id window or address pool for another Alveole daemon",
            hint=f"remove the state directories of daemons no longer used; claims are in {CLAIMS}",
        )
    return {"id": identifier, "window": window, "pool": pool}


def _rotated(values: range, start: int) -> list[int]:
    shift = start % len(values)
    return [*values[shift:], *values[:shift]]


def _free(pool: str) -> bool:
    """Whether no route of the host leads into this pool (/proc/net/route holds little-endian hex)."""
    network = ipaddress.IPv4Network(pool)
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        fields = line.split()
        address, mask = (int.from_bytes(bytes.fromhex(fields[i])[::-1]) for i in (1, 7))
        if mask and ipaddress.IPv4Network((address, mask.bit_count())).overlaps(network):
            return False
    return True


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
