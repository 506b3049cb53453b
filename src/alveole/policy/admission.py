"""Whether a spec makes sense at all, before anything is written. Pure."""

import posixpath
import re
import signal
from ipaddress import IPv4Address

from alveole.model.error import AlveoleError, ErrorCode, invalid
from alveole.model.instance import InstanceSpec, Mount, Port

SHARED_NETWORKS = frozenset({"host", "none"})
"""Networks that are modes, not records."""

_RESERVED_TARGETS = ("/", "/proc", "/sys", "/dev")
_ENV_NAME = re.compile(r"^[^=\0]+$")


def check_spec(spec: InstanceSpec) -> None:
    """Raise AlveoleError(INVALID) naming the field for what the types alone cannot refuse."""
    _check_ports(spec)
    _check_mounts(spec.mounts)
    for name, value in spec.env.items():
        if not _ENV_NAME.match(name) or "\0" in value:
            raise invalid(f"environment variable {name!r} has an unusable name or value", field="spec.env")
    if spec.restart.max_retries and spec.restart.policy != "on-failure":
        raise invalid("max_retries needs the restart policy on-failure", field="spec.restart.max_retries")
    if spec.remove_on_exit and spec.restart.policy != "no":
        raise invalid("remove_on_exit and a restart policy exclude each other", field="spec.restart.policy")
    if spec.stop_signal is not None:
        signal_number(spec.stop_signal, field="spec.stop_signal")
    _check_rates(spec)
    if spec.network == "host" and spec.hostname is not None:
        raise invalid("an instance on the host's network has the host's name", field="spec.hostname")
    _check_text(spec)


def _check_rates(spec: InstanceSpec) -> None:
    for name in ("net_receive_bps", "net_send_bps"):
        if spec.network in SHARED_NETWORKS and getattr(spec.resources, name) is not None:
            raise invalid(
                f"what an instance receives and sends cannot be limited on network {spec.network}",
                hint="leave out the limit, or give it a network of its own",
                field=f"spec.resources.{name}",
            )


def _check_text(spec: InstanceSpec) -> None:
    """No NUL in what the kernel takes as a string that ends with one."""
    texts = {"entrypoint": spec.entrypoint, "command": spec.command, "user": (spec.user,), "workdir": (spec.workdir,)}
    for name, words in texts.items():
        if any("\0" in word for word in words or () if word is not None):
            raise invalid(f"{name} may not contain NUL", field=f"spec.{name}")


def _check_ports(spec: InstanceSpec) -> None:
    if spec.ports and spec.network in SHARED_NETWORKS:
        raise invalid(
            f"ports cannot be published on network {spec.network}",
            hint="with network host the instance's ports are the host's own",
            field="spec.ports",
        )
    seen: set[tuple[str, str, int]] = set()
    for index, port in enumerate(spec.ports):
        _check_port_address(port, index)
        key = (port.host_address, port.protocol, port.host_port)
        if key in seen:
            raise invalid(
                f"host port {port.host_port}/{port.protocol} is published twice", field=f"spec.ports[{index}]"
            )
        seen.add(key)


def _check_port_address(port: Port, index: int) -> None:
    try:
        IPv4Address(port.host_address)
    except ValueError:
        raise invalid(
            f"host address {port.host_address!r} is not an IPv4 address", field=f"spec.ports[{index}].host_address"
        ) from None


def _check_mounts(mounts: tuple[Mount, ...]) -> None:
    targets: set[str] = set()
    for index, mount in enumerate(mounts):
        field = f"spec.mounts[{index}]"
        target = posixpath.normpath(mount.target)
        if ".." in mount.target.split("/") or target in _RESERVED_TARGETS or target.startswith(("/proc/", "/sys/")):
            raise invalid(f"nothing may be mounted at {mount.target}", field=f"{field}.target")
        if "\0" in mount.target + mount.source:
            raise invalid("a path may not contain NUL", field=field)
        if target in targets:
            raise invalid(f"two mounts have the target {target}", field=f"{field}.target")
        targets.add(target)
        _check_source(mount, field)


def _check_source(mount: Mount, field: str) -> None:
    if mount.kind == "bind" and not mount.source.startswith("/"):
        raise invalid(f"bind source {mount.source!r} is not an absolute path", field=f"{field}.source")
    if mount.kind == "volume" and not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,62}", mount.source):
        raise invalid(
            f"{mount.source!r} is not a volume name",
            hint="lower-case letters, digits, . _ - and at most 63 characters",
            field=f"{field}.source",
        )
    if mount.kind == "tmpfs" and mount.source:
        raise invalid("a tmpfs has no source", field=f"{field}.source")
    if mount.kind != "tmpfs" and mount.size_bytes is not None:
        raise invalid("only a tmpfs takes a size here", field=f"{field}.size_bytes")


def signal_number(name: str, *, field: str = "signal") -> int:
    """``SIGTERM``, ``TERM`` or ``15`` as a number. Raises INVALID."""
    text = name.upper()
    if re.fullmatch(r"[0-9]{1,2}", text) and 1 <= int(text) <= signal.SIGRTMAX:
        return int(text)
    try:
        return signal.Signals[text if text.startswith("SIG") else f"SIG{text}"].value
    except KeyError:
        raise AlveoleError(
            ErrorCode.INVALID, f"{name!r} is not a signal", hint="such as SIGTERM", field=field
        ) from None
