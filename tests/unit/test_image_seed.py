"""The seed of a whole operating system: what is in it, and what is left of it when it cannot be made."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alveole.image.seed import make_seed
from alveole.model.error import AlveoleError, ErrorCode

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ somebody@somewhere: \"quoted\" 'twice'"
SECRET = "#cloud-config\npassword: s3cr3t — ✓\r\n\tlast line without an end"


async def make(target: Path, **changes: Any) -> None:
    given: dict[str, Any] = {
        "instance_id": "0123456789ab",
        "hostname": "web-1",
        "user_data": SECRET,
        "ssh_keys": (KEY, "ssh-rsa BBBB"),
        "address": "192.0.0.2",
        "gateway": "192.0.0.1",
        "mac": "02:00:00:00:00:AA",
        "nameserver": "10.64.0.1",
    }
    await make_seed(target, **{**given, **changes})


def read(seed: Path, directory: Path) -> dict[str, bytes]:
    """All its files by name, as a reader of ISO 9660 sees them."""
    argv = ["xorriso", "-no_rc", "-osirrox", "on", "-indev", str(seed), "-extract", "/", str(directory)]
    subprocess.run(argv, check=True, capture_output=True, timeout=30)
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


async def test_what_is_in_it(tmp_path: Path) -> None:
    seed = tmp_path / "seed.iso"
    await make(seed)
    assert seed.stat().st_mode & 0o7777 == 0o600
    assert seed.stat().st_size % 2048 == 0
    label = subprocess.run(["blkid", "-p", "-s", "LABEL", "-o", "value", seed], check=True, capture_output=True)
    assert label.stdout == b"CIDATA\n"
    files = read(seed, tmp_path / "files")
    assert set(files) == {"meta-data", "user-data", "network-config"}
    assert files["user-data"] == SECRET.encode()
    assert json.loads(files["meta-data"]) == {
        "instance-id": "0123456789ab",
        "local-hostname": "web-1",
        "public-keys": [KEY, "ssh-rsa BBBB"],
    }
    network = json.loads(files["network-config"])
    assert network["version"] == 2
    (card,) = network["ethernets"].values()
    assert card["match"] == {"macaddress": "02:00:00:00:00:aa"}
    assert card["routes"] == [{"to": "0.0.0.0/0", "via": "192.0.0.1", "on-link": True}]
    assert card["nameservers"] == {"addresses": ["10.64.0.1"]}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("seed")] == ["seed.iso"]


@pytest.mark.parametrize(
    ("address", "gateway", "prefix"),
    [
        ("192.0.0.2", "192.0.0.1", 30),
        ("192.0.0.1", "192.0.0.2", 30),
        ("10.64.0.2", "10.64.0.1", 30),
        ("10.64.0.3", "10.64.0.1", 32),  # it would be the broadcast address
        ("10.64.0.4", "10.64.0.1", 32),
        ("10.64.7.9", "10.64.0.1", 32),
        ("10.64.0.1", "10.64.0.1", 32),
    ],
)
async def test_address(address: str, gateway: str, prefix: int, tmp_path: Path) -> None:
    await make(tmp_path / "seed.iso", address=address, gateway=gateway)
    network = json.loads(read(tmp_path / "seed.iso", tmp_path / "files")["network-config"])
    (card,) = network["ethernets"].values()
    assert card["addresses"] == [f"{address}/{prefix}"]


async def test_without_user_data_it_is_still_a_seed(tmp_path: Path) -> None:
    await make(tmp_path / "seed.iso", user_data="")
    assert read(tmp_path / "seed.iso", tmp_path / "files")["user-data"] == b"#cloud-config\n"


async def test_again(tmp_path: Path) -> None:
    """After another, and after one that was cut short."""
    seed = tmp_path / "seed.iso"
    await make(seed)
    left = tmp_path / "seed.iso.new" / "seed"
    left.mkdir(parents=True)
    (left / "vendor-data").write_text("of somebody killed")
    await make(seed, user_data="#!/bin/sh\n")
    files = read(seed, tmp_path / "files")
    assert files["user-data"] == b"#!/bin/sh\n"
    assert "vendor-data" not in files
    assert not left.parent.exists()


async def test_no_argument_of_a_program_is_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    spawn = asyncio.create_subprocess_exec

    async def note(*argv: str, **options: Any) -> asyncio.subprocess.Process:
        seen.extend([*argv, *options["env"].values()])
        return await spawn(*argv, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", note)
    await make(tmp_path / "seed.iso")
    assert "xorriso" in seen
    assert not [word for word in seen if "s3cr3t" in word or "ssh-" in word]


async def test_cancelled(tmp_path: Path) -> None:
    seed = tmp_path / "seed.iso"
    work = asyncio.create_task(make(seed, user_data="x" * (64 << 20)))
    while not (tmp_path / "seed.iso.new" / "image").exists():
        assert not work.done()
        await asyncio.sleep(0.001)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 300 KiB."""
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", root], check=True)
    yield root
    subprocess.run(["umount", root], check=True)


@pytest.mark.root
@pytest.mark.parametrize("size_bytes", [10, 280_000, 400_000])
async def test_no_space(size_bytes: int, small_disk: Path) -> None:
    """For the image, and for what is to be in it."""
    with pytest.raises(AlveoleError, match="no space for a seed") as error:
        await make(small_disk / "seed.iso", user_data="x" * size_bytes)
    assert error.value.code == ErrorCode.EXHAUSTED
    assert list(small_disk.iterdir()) == []
