"""How fast an instance may receive and send, enforced on the host's end of its devices, which it cannot touch.

What goes to it waits in a token bucket there. What comes from it makes a detour over a device of its own with such a
bucket: packets wait, and senders slow down, where a filter alone could only drop.
"""

import errno

from alveole.host import sysctl
from alveole.host.netlink import Message, Netlink, NetlinkError, link_up, new_detour
from alveole.host.traffic import delete_ingress, new_bucket, new_ingress, redirect_received
from alveole.model.error import unsupported

_BURST_S, _LEAST_BURST_BYTES, _MOST_BURST_BYTES = 0.02, 16 << 10, 1 << 20  # what may pass at once
_QUEUE_S, _LEAST_QUEUE_BYTES, _MOST_QUEUE_BYTES = 0.1, 256 << 10, 4 << 20  # what may wait, in the host's memory
DETOUR = "i"
_NOT_IN_KERNEL = {errno.ENOENT, errno.EOPNOTSUPP}


def detour_of(device: str) -> str:
    """The device that packets received by ``device`` make their detour over."""
    return device + DETOUR


def limit(device: str, *, receive_bps: int | None, send_bps: int | None) -> None:
    """Bytes a second that the instance behind ``device`` may receive and send; None: no limit was asked for.

    Idempotent. Blocks. Raises AlveoleError(UNSUPPORTED) if this kernel cannot.
    """
    try:
        with Netlink() as host:
            if receive_bps is not None:
                host.send([_bucket(host.index_of(device), receive_bps)])
            if send_bps is not None:
                _limit_sending(host, device, send_bps)
    except NetlinkError as error:
        if error.errno not in _NOT_IN_KERNEL:
            raise
        raise unsupported(
            f"this kernel cannot limit network rates: {error.strerror}",
            hint="load the modules sch_tbf, sch_ingress, cls_u32, act_mirred and ifb, or leave out the limit",
        ) from error


def _limit_sending(host: Netlink, device: str, send_bps: int) -> None:
    detour = detour_of(device)
    host.send([new_detour(detour)], ignore=[errno.EEXIST])
    sysctl.write_if_present(f"net/ipv6/conf/{detour}/disable_ipv6", "1")
    source, target = host.index_of(device), host.index_of(detour)
    host.send([_bucket(target, send_bps), link_up(detour)])
    host.send([delete_ingress(source)], ignore=[errno.ENOENT, errno.EINVAL])
    host.send([new_ingress(source), redirect_received(source, target)])


def _bucket(index: int, rate_bps: int) -> Message:
    burst_bytes = max(_LEAST_BURST_BYTES, min(int(_BURST_S * rate_bps), _MOST_BURST_BYTES))
    queue_bytes = max(_LEAST_QUEUE_BYTES, min(int(_QUEUE_S * rate_bps), _MOST_QUEUE_BYTES))
    return new_bucket(index, rate_bps=rate_bps, burst_bytes=burst_bytes, queue_bytes=queue_bytes)
