"""What a whole operating system is told at its first boot: a cloud-init seed, as its data source NoCloud reads it.

The seed is an ISO 9660 file system labelled CIDATA. Its names are those of Rock Ridge, which Linux reads without any
character set (VFAT needs two, and small systems lack them), and of Joliet for others.
"""

import errno
import json
import os
import shutil
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from alveole.host.blocking import in_thread
from alveole.host.process import run
from alveole.model.error import AlveoleError, exhausted

_LABEL = "CIDATA"
_DEVICE = "eth0"
_NO_USER_DATA = "#cloud-config\n"  # without the file, the seed does not count
_TIMEOUT_S = 60.0
_NO_SPACE = ("No space left on device", "exceeds free space")  # as xorriso says it


async def make_seed(
    target: Path,
    *,
    instance_id: str,
    hostname: str,
    user_data: str,
    ssh_keys: tuple[str, ...],
    address: str,
    gateway: str,
    mac: str,
    nameserver: str,
) -> None:
    """Make the seed ``target``, readable by root alone; what was there is replaced at once, or not at all.

    ``user_data`` reaches cloud-init as it is. ``address`` and ``gateway`` are IPv4, without prefix; the gateway is on
    the link, whatever the address is; an empty ``nameserver`` is none. Killed at any time, it may leave a directory
    beside ``target``, which the next call removes. Raises EXHAUSTED if the disk is full, UNSUPPORTED if xorriso is not
    installed.
    """
    files = {
        "meta-data": _meta_data(instance_id, hostname, ssh_keys),
        "user-data": user_data or _NO_USER_DATA,
        "network-config": _network_config(address=address, gateway=gateway, mac=mac, nameserver=nameserver),
    }
    work = target.with_name(f"{target.name}.new")
    try:
        await in_thread(partial(_stage, work, files))
        await _write_image(work / "seed", work / "image")
        await in_thread(partial(_finish, work / "image", target))
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _no_space(target) from error
        raise
    finally:
        await in_thread(partial(shutil.rmtree, work, ignore_errors=True))


def _meta_data(instance_id: str, hostname: str, ssh_keys: tuple[str, ...]) -> str:
    """JSON is YAML, and needs no thought about quoting."""
    return json.dumps({"instance-id": instance_id, "local-hostname": hostname, "public-keys": list(ssh_keys)})


def _network_config(*, address: str, gateway: str, mac: str, nameserver: str) -> str:
    card = {
        "match": {"macaddress": mac.lower()},
        "set-name": _DEVICE,  # so that those who know no match find the card by its name
        "dhcp4": False,
        "addresses": [f"{address}/{_prefix(IPv4Address(address), IPv4Address(gateway))}"],
        "routes": [{"to": "0.0.0.0/0", "via": gateway, "on-link": True}],
        "nameservers": {"addresses": [nameserver] if nameserver else []},
    }
    return json.dumps({"version": 2, "ethernets": {_DEVICE: card}})


def _prefix(address: IPv4Address, gateway: IPv4Address) -> int:
    """30 if these two are all of such a network, else 32.

    With 32 the gateway is reached because the route says that it is on the link, and of what cloud-init writes network
    configurations for, only netplan is told that. With 30 all of them reach it.
    """
    both = IPv4Network((address, 30), strict=False)
    return 30 if {address, gateway} == set(both.hosts()) else 32


def _stage(work: Path, files: dict[str, str]) -> None:
    """The files, where only root looks: user data may hold secrets."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=0o700)
    (work / "seed").mkdir()
    for name, content in files.items():
        (work / "seed" / name).write_text(content, encoding="utf-8", newline="")


async def _write_image(directory: Path, image: Path) -> None:
    layout = ["-quiet", "-volid", _LABEL, "-rational-rock", "-joliet"]
    argv = ["xorriso", "-no_rc", "-as", "mkisofs", *layout, "-output", str(image), str(directory)]
    result = await run(argv, timeout_s=_TIMEOUT_S, check=False)
    if result.code == 0:
        return
    failure = result.failure()
    raise _no_space(image) if any(words in failure.message for words in _NO_SPACE) else failure


def _finish(image: Path, target: Path) -> None:
    image.chmod(0o600)
    descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    image.rename(target)


def _no_space(target: Path) -> AlveoleError:
    return exhausted(f"no space for a seed: the disk of {target.parent} is full", hint="free some space on it")
