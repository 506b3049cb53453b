"""Traffic control over netlink: token buckets, and a detour for what a device receives. Pure; the messages' layouts are
those of linux/pkt_sched.h and linux/pkt_cls.h."""

import socket
import struct

from alveole.host.netlink import Message, attribute, nested, text

_NEWQDISC, _DELQDISC, _NEWFILTER = 36, 37, 44
_F_REPLACE, _F_EXCL, _F_CREATE = 0x100, 0x200, 0x400
_HEAD = struct.Struct("=BxxxiIII")  # family, device, handle, parent, info
_ROOT, _INGRESS, _INGRESS_HANDLE = 0xFFFFFFFF, 0xFFFFFFF1, 0xFFFF0000
_RATE = struct.Struct("=BBHhHI")  # cell log, link layer, overhead, cell alignment, least unit, bytes a second
_ETHERNET = 1  # the link layer; with none named the kernel wants a table of times
_ALL_PROTOCOLS = 0x0003
_U32_TERMINAL = 1
_STOLEN, _REDIRECT_TO_EGRESS = 4, 1
_MOST_32_BITS = (1 << 32) - 1


def new_bucket(index: int, *, rate_bps: int, burst_bytes: int, queue_bytes: int) -> Message:
    """What leaves a device leaves it at ``rate_bps`` bytes a second; what would wait behind ``queue_bytes`` is dropped.

    Replaces another bucket there.
    """
    rate = _RATE.pack(0, _ETHERNET, 0, 0, 0, min(rate_bps, _MOST_32_BITS))
    parameters = rate + bytes(_RATE.size) + struct.pack("=III", queue_bytes, 0, 0)
    options = nested(
        2,
        attribute(1, parameters),
        attribute(4, struct.pack("=Q", rate_bps)),
        attribute(6, struct.pack("=I", burst_bytes)),
    )
    payload = _HEAD.pack(0, index, 0, _ROOT, 0) + text(1, "tbf") + options
    return Message(_NEWQDISC, _F_CREATE | _F_REPLACE, payload, "limit a rate (sch_tbf)")


def new_ingress(index: int) -> Message:
    """A place for filters on what a device receives."""
    payload = _HEAD.pack(0, index, _INGRESS_HANDLE, _INGRESS, 0) + text(1, "ingress")
    return Message(_NEWQDISC, _F_CREATE | _F_EXCL, payload, "filter what is received (sch_ingress)")


def delete_ingress(index: int) -> Message:
    """With all its filters. ENOENT or EINVAL, by the kernel's version, if there is none."""
    payload = _HEAD.pack(0, index, _INGRESS_HANDLE, _INGRESS, 0)
    return Message(_DELQDISC, 0, payload, "stop filtering what is received")


def redirect_received(index: int, target: int) -> Message:
    """All that a device with ``new_ingress`` receives leaves through ``target`` first (see ``new_detour``)."""
    everything = struct.pack("=BBBxHHhhI", _U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + bytes(16)
    mirred = struct.pack("=IIiiiiI", 0, 0, _STOLEN, 0, 0, _REDIRECT_TO_EGRESS, target)
    action = nested(1, text(1, "mirred"), nested(2, attribute(2, mirred)))
    options = nested(2, attribute(5, everything), nested(7, action))
    info = 1 << 16 | socket.htons(_ALL_PROTOCOLS)  # priority, protocol
    payload = _HEAD.pack(0, index, 0, _INGRESS_HANDLE, info) + text(1, "u32") + options
    return Message(_NEWFILTER, _F_CREATE | _F_EXCL, payload, "redirect what is received (cls_u32, act_mirred)")
