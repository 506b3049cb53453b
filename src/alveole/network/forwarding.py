"""Whether this host forwards packets. Where it did not before Alveole, it goes on not to, but for Alveole's devices.

Several daemons share the one switch: each that found it off, or on only because of another of them, remembers so in its
run directory and denies foreign traffic in its table. The last of them switches it off again.
"""

from pathlib import Path

from alveole.host import nft, sysctl
from alveole.host.identity import Identity
from alveole.network.rules import FOREIGN_CHAIN

_SWITCH = "net/ipv4/ip_forward"


async def ensure_decided(identity: Identity) -> bool:
    """Whether forwarding is on, or will be, because of Alveole only; remembered until ``release``."""
    marker = _marker(identity)
    if not marker.exists() and (sysctl.read(_SWITCH) == "0" or await _others_deny(identity)):
        marker.touch()
    return marker.exists()


def ensure_on() -> None:
    """Switch it on. The tables that deny foreign traffic must be loaded before."""
    if sysctl.read(_SWITCH) == "0":
        sysctl.write(_SWITCH, "1")


async def release(identity: Identity) -> None:
    """Switch it off if it was off before, unless another daemon needs it. Our own table must be gone."""
    marker = _marker(identity)
    if marker.exists() and not await _others_deny(identity):
        sysctl.write(_SWITCH, "0")
    marker.unlink(missing_ok=True)


def _marker(identity: Identity) -> Path:
    return identity.run / "forwarding-switched-on"


async def _others_deny(identity: Identity) -> bool:
    tables = [name for name in await nft.list_tables() if name.startswith("alveole_") and name != identity.table]
    rules = [await nft.list_table(name) for name in tables]
    return any(f"chain {FOREIGN_CHAIN} " in text for text in rules if text)
