"""A program that tells a running sandbox who it is now: there is no other way into its kernel.

It is made anew for each, of a few system calls one after the other, so that it needs nothing of the image, which may
hold no other program. It exits with 0, or the number of the first error, and wants CAP_SYS_ADMIN and CAP_NET_ADMIN.
"""

import platform
import socket
import struct
from collections.abc import Sequence

from alveole.model.error import unsupported

_ORIGIN = 0x400000
_HEADERS_BYTES = 64 + 56
_WRITE, _SOCKET, _EXIT, _SETHOSTNAME = 1, 41, 60, 170
_RTM_DELADDR, _REQUEST_AND_ACK = 21, 5
_IFA_LOCAL = 2
_EAX, _EDX, _ESI, _EDI = b"\xb8", b"\xba", b"\xbe", b"\xbf"  # mov register, number
_SYSCALL = b"\x0f\x05"
_KEEP_RESULT, _KEPT_TO_EDI = b"\x89\xc3", b"\x89\xdf"  # mov ebx, eax; mov edi, ebx
_READ_ANSWER = (
    b"\x31\xc0"  # xor eax, eax
    b"\x48\x8d\xb4\x24\x00\xfe\xff\xff"  # lea rsi, [rsp-512]
    b"\xba\x00\x02\x00\x00"  # mov edx, 512
    b"\x0f\x05"
)
_ANSWER_TO_EAX = b"\x8b\x84\x24\x10\xfe\xff\xff"  # mov eax, [rsp-512+16]: 0, or an error below 0
_IF_BELOW_ZERO = b"\x85\xc0\x0f\x88"  # test eax, eax; js
_FAIL = b"\x89\xc7\xf7\xdf" + _EAX + struct.pack("<I", _EXIT) + _SYSCALL  # mov edi, eax; neg edi


class _Code:
    """Instructions, and what they refer to behind them."""

    def __init__(self) -> None:
        self._code = b""
        self._checks: list[int] = []  # where the distance to the end goes
        self._data = b""
        self._references: list[tuple[int, int]] = []  # where an address goes, and of what in the data

    def add(self, code: bytes) -> None:
        self._code += code

    def load(self, register: bytes, number: int) -> None:
        self._code += register + struct.pack("<I", number)

    def load_data(self, register: bytes, data: bytes) -> None:
        self._references.append((len(self._code) + 1, len(self._data)))
        self.load(register, 0)
        self._data += data

    def check(self) -> None:
        """Give up if the last result is an error."""
        self.add(_IF_BELOW_ZERO)
        self._checks.append(len(self._code))
        self.add(bytes(4))

    def assembled(self) -> bytes:
        code = bytearray(self._code + _FAIL)
        for place in self._checks:
            struct.pack_into("<i", code, place, len(self._code) - place - 4)
        for place, offset in self._references:
            struct.pack_into("<I", code, place, _ORIGIN + _HEADERS_BYTES + len(code) + offset)
        return bytes(code) + self._data


def program(hostname: str, device: int, addresses: Sequence[str]) -> bytes:
    """Sets the host name, and takes IPv4 ``addresses``/32 from the device of that number.

    Raises UNSUPPORTED on processors it was not written for.
    """
    if platform.machine() != "x86_64":
        raise unsupported(f"a sandbox cannot go on from another on {platform.machine()}", hint="use a host with x86-64")
    code = _Code()
    code.load(_EAX, _SETHOSTNAME)
    code.load_data(_EDI, hostname.encode())
    code.load(_ESI, len(hostname.encode()))
    code.add(_SYSCALL)
    code.check()
    if addresses:
        _open_netlink(code)
    for address in addresses:
        _take_away(code, device, address)
    code.load(_EAX, _EXIT)
    code.load(_EDI, 0)
    code.add(_SYSCALL)
    return _executable(code.assembled())


def _open_netlink(code: _Code) -> None:
    code.load(_EAX, _SOCKET)
    code.load(_EDI, socket.AF_NETLINK)
    code.load(_ESI, socket.SOCK_RAW)
    code.load(_EDX, 0)
    code.add(_SYSCALL)
    code.check()
    code.add(_KEEP_RESULT)


def _take_away(code: _Code, device: int, address: str) -> None:
    body = struct.pack("=BBBBIHH4s", socket.AF_INET, 32, 0, 0, device, 8, _IFA_LOCAL, socket.inet_aton(address))
    message = struct.pack("=IHHII", 16 + len(body), _RTM_DELADDR, _REQUEST_AND_ACK, 1, 0) + body
    code.load(_EAX, _WRITE)
    code.add(_KEPT_TO_EDI)
    code.load_data(_ESI, message)
    code.load(_EDX, len(message))
    code.add(_SYSCALL)
    code.check()
    code.add(_KEPT_TO_EDI + _READ_ANSWER)
    code.check()
    code.add(_ANSWER_TO_EAX)
    code.check()


def _executable(content: bytes) -> bytes:
    """An ELF file of 64 bits for x86-64: one segment, readable and executable, begun at its first instruction."""
    entry, size = _ORIGIN + _HEADERS_BYTES, _HEADERS_BYTES + len(content)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _ORIGIN, _ORIGIN, size, size, 0x1000)
    return header + segment + content
