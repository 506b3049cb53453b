"""What users write on the command line, read into the API's values. Pure: each function raises BadValueError."""

import re
from collections.abc import Mapping
from typing import Any

from alveole.cli.context import BadValueError

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*(?:([bkmgt])(?:i?b)?)?$", re.IGNORECASE)
_SIZE_BYTES = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PORT_FORM = "[ADDRESS:]HOST_PORT:INSTANCE_PORT[/tcp|udp], such as 8080:80"
_VOLUME_FORM = "VOLUME:/PATH[:ro] or /HOST/PATH:/PATH[:ro]"
_MOUNT_KEYS = "type=volume|bind|tmpfs, source=, target=, readonly, tmpfs-size="
_PUBLIC_KEY = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/=]+( [^\x00-\x1f]*)?")


def size_bytes(flag: str, text: str) -> int:
    found = _SIZE.match(text.strip())
    if not found:
        raise BadValueError(flag, text, "not a size", "bytes, or a number with k, m, g or t, such as 512m")
    unit_bytes = _SIZE_BYTES[(found[2] or "b").lower()]
    return int(float(found[1]) * unit_bytes) if "." in found[1] else int(found[1]) * unit_bytes


def duration_s(flag: str, text: str) -> float:
    """Seconds. A bare number is seconds too."""
    parts = _DURATION_PART.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return float(sum(float(number) * _DURATION_S[unit] for number, unit in parts))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise BadValueError(flag, text, "not a time", "a number with ms, s, m, h or d, such as 1m30s")
    return seconds


def pair(flag: str, text: str) -> tuple[str, str]:
    """KEY=VALUE, or KEY alone for an empty value."""
    key, _, value = text.partition("=")
    if not key:
        raise BadValueError(flag, text, "the key is missing", "KEY=VALUE")
    return key, value


def environment(flag: str, lines: tuple[str, ...], caller: Mapping[str, str]) -> dict[str, str]:
    """KEY=VALUE each; KEY alone takes the caller's value and is left out where the caller has none."""
    chosen: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if not key or "\0" in line:
            raise BadValueError(flag, line, "not an environment variable", "KEY=VALUE, or KEY for your own value")
        if equals:
            chosen[key] = value
        elif key in caller:
            chosen[key] = caller[key]
    return chosen


def environment_file_lines(content: str) -> tuple[str, ...]:
    """The variables of an --env-file: one a line; empty lines and those that begin with # mean nothing."""
    lines = (line.lstrip() for line in content.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def port(flag: str, text: str) -> dict[str, Any]:
    numbers, slash, protocol = text.partition("/")
    address, ports, instance_port = ["", "", *numbers.rsplit(":", 2)][-3:]
    if "-" in ports or "-" in instance_port:
        raise BadValueError(flag, text, "port ranges are not supported", f"one --publish for each port: {_PORT_FORM}")
    if ports in {"", "0"}:
        raise BadValueError(flag, text, "the host port is missing", _PORT_FORM)
    if slash and protocol not in {"tcp", "udp"}:
        raise BadValueError(flag, text, f"unknown protocol {protocol!r}", "tcp or udp")
    published = {
        "host_port": _port_number(flag, text, ports),
        "instance_port": _port_number(flag, text, instance_port),
        "protocol": protocol or "tcp",
    }
    return {"host_address": _address(flag, text, address), **published} if address else published


def _port_number(flag: str, text: str, number: str) -> int:
    if not (number.isascii() and number.isdecimal() and 1 <= int(number) <= 65535):
        raise BadValueError(flag, text, f"{number!r} is not a port", f"1 to 65535, as in {_PORT_FORM}")
    return int(number)


def _address(flag: str, text: str, address: str) -> str:
    parts = address.split(".")
    if len(parts) != 4 or not all(part.isascii() and part.isdecimal() and int(part) <= 255 for part in parts):
        raise BadValueError(flag, text, f"{address!r} is not an IPv4 address", "such as 127.0.0.1:8080:80")
    return address


def volume(flag: str, text: str) -> dict[str, Any]:
    """The short form of a mount."""
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not source or not rest:
        raise BadValueError(flag, text, "source or target is missing", _VOLUME_FORM)
    if mode not in {"", "ro", "rw"}:
        raise BadValueError(flag, text, f"unknown option {mode!r}", "ro or rw")
    return _mount(flag, text, "bind" if "/" in source else "volume", source, target, read_only=mode == "ro")


def mount(flag: str, text: str) -> dict[str, Any]:
    """The long form: comma-separated KEY=VALUE."""
    chosen: dict[str, str] = {}
    names = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        key = names.get(key, key)
        if key not in {"type", "source", "target", "readonly", "tmpfs-size"}:
            raise BadValueError(flag, text, f"unknown key {key!r}", _MOUNT_KEYS)
        chosen[key] = value if equals else "true"
    kind = chosen.get("type", "volume")
    if kind not in {"volume", "bind", "tmpfs"}:
        raise BadValueError(flag, text, f"unknown type {kind!r}", "volume, bind or tmpfs")
    if (kind == "tmpfs") == bool(chosen.get("source")):
        why = "a tmpfs has no source" if kind == "tmpfs" else "the source is missing"
        raise BadValueError(flag, text, why, _MOUNT_KEYS)
    if chosen.get("readonly", "false") not in {"true", "false", "1", "0"}:
        raise BadValueError(flag, text, f"readonly is {chosen['readonly']!r}", "true or false")
    if "tmpfs-size" in chosen and kind != "tmpfs":
        raise BadValueError(flag, text, "only a tmpfs has a tmpfs-size", "type=tmpfs")
    read_only = chosen.get("readonly") in {"true", "1"}
    made = _mount(flag, text, kind, chosen.get("source", ""), chosen.get("target", ""), read_only=read_only)
    if "tmpfs-size" in chosen:
        made["size_bytes"] = _tmpfs_size(flag, chosen["tmpfs-size"])
    return made


def tmpfs(flag: str, text: str) -> dict[str, Any]:
    """PATH[:size=SIZE,ro]."""
    target, _, options = text.partition(":")
    made = _mount(flag, text, "tmpfs", "", target, read_only=False)
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key == "size":
            made["size_bytes"] = _tmpfs_size(flag, value)
        elif option in {"ro", "rw"}:
            made["read_only"] = option == "ro"
        else:
            raise BadValueError(flag, text, f"unknown option {option!r}", "PATH[:size=SIZE,ro]")
    return made


def _tmpfs_size(flag: str, text: str) -> int:
    size = size_bytes(flag, text)
    if size < 4096:
        raise BadValueError(flag, text, "too small for a tmpfs", "4k or more")
    return size


def _mount(flag: str, text: str, kind: str, source: str, target: str, *, read_only: bool) -> dict[str, Any]:
    if kind == "bind" and not source.startswith("/"):
        raise BadValueError(flag, text, f"the host path {source!r} is not absolute", "/HOST/PATH, or a volume's name")
    if kind == "volume" and "/" in source:
        raise BadValueError(flag, text, f"{source!r} is not a volume's name", "type=bind for a host path")
    if not target.startswith("/"):
        raise BadValueError(flag, text, f"the target {target!r} is not absolute", "a path that begins with /")
    made: dict[str, Any] = {"kind": kind, "target": target, "read_only": read_only}
    return {**made, "source": source} if source else made


def restart(flag: str, text: str) -> dict[str, Any]:
    policy, colon, retries = text.partition(":")
    valid = "no, always, unless-stopped, on-failure or on-failure:RETRIES"
    if policy not in {"no", "always", "unless-stopped", "on-failure"}:
        raise BadValueError(flag, text, "no such policy", valid)
    if not colon:
        return {"policy": policy}
    if policy != "on-failure" or not (retries.isascii() and retries.isdecimal()):
        raise BadValueError(flag, text, "a number of retries goes with on-failure only", valid)
    return {"policy": policy, "max_retries": int(retries)}


def signal_value(text: str) -> str | int:
    """A signal as the API takes it: its number, or its name with SIG before it."""
    if text.isdecimal():
        return int(text)
    name = text.upper()
    return name if name.startswith("SIG") else f"SIG{name}"


def public_keys(flag: str, content: str) -> list[str]:
    """The lines of a file that hold keys, such as ssh-keygen makes. Raises BadValueError; no key is told in it."""
    valid = "the public key, such as ~/.ssh/id_ed25519.pub"
    lines = [line.strip() for line in content.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise BadValueError(flag, content, "holds no key", valid)
    for key in keys:
        if not _PUBLIC_KEY.fullmatch(key):
            why = "is a private key, which is told to nobody" if "PRIVATE KEY" in content else "is no public key"
            raise BadValueError(flag, "...", why, valid)
    return keys
