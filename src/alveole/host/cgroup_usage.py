"""What cgroup files say, v1 and v2: pure parsers and the readers that apply them."""

import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESRCH, errno.EOPNOTSUPP})
_V1_UNLIMITED_BYTES = 1 << 60  # v1 writes "no limit" as the largest multiple of a page


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """None: this host cannot tell; for the limit also: there is none.

    Memory is the working set: without file cache that could go at once. I/O is what block devices were asked for,
    so a write to a volume counts on its loop device and, where the kernel can tell whose it is, on the disk below.
    """

    cpu_s: float | None = None
    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    pids: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None

    def or_else(self, other: "Usage") -> "Usage":
        """This, its unknown fields taken from ``other``."""
        fields = Usage.__slots__
        return Usage(
            **{name: value if (value := getattr(self, name)) is not None else getattr(other, name) for name in fields}
        )


def parse_flat(text: str) -> dict[str, int]:
    """Lines of "key number", as in memory.stat, cpu.stat, memory.events and memory.oom_control."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def parse_io_v2(text: str) -> tuple[int, int]:
    """Bytes read and written in io.stat, over all devices."""
    pairs = [field.partition("=") for line in text.splitlines() for field in line.split()[1:]]
    read = sum(int(value) for name, _, value in pairs if name == "rbytes")
    return read, sum(int(value) for name, _, value in pairs if name == "wbytes")


def parse_io_v1(text: str) -> tuple[int, int]:
    """Bytes read and written in blkio.throttle.io_service_bytes_recursive, over all devices."""
    lines = [fields for fields in (line.split() for line in text.splitlines()) if len(fields) == 3]
    read = sum(int(number) for _, name, number in lines if name == "Read")
    return read, sum(int(number) for _, name, number in lines if name == "Write")


def usage_v2(directory: Path) -> Usage:
    cpu = _flat(directory / "cpu.stat").get("usage_usec")
    memory = _number(directory / "memory.current")
    cache = _flat(directory / "memory.stat").get("inactive_file", 0)
    io = read_text(directory / "io.stat")
    read, written = (None, None) if io is None else parse_io_v2(io)
    return Usage(
        cpu_s=None if cpu is None else cpu / 1e6,
        memory_bytes=None if memory is None else max(0, memory - cache),
        memory_limit_bytes=_number(directory / "memory.max"),
        pids=_number(directory / "pids.current"),
        io_read_bytes=read,
        io_write_bytes=written,
    )


def usage_v1(controllers: Mapping[str, Path], cgroup: str) -> Usage:
    """``controllers``: where each is mounted."""

    def file(controller: str, name: str) -> Path:
        return controllers.get(controller, Path("/nonexistent")) / cgroup / name

    cpu = _number(file("cpuacct", "cpuacct.usage"))
    memory = _number(file("memory", "memory.usage_in_bytes"))
    cache = _flat(file("memory", "memory.stat")).get("total_inactive_file", 0)
    limit = _number(file("memory", "memory.limit_in_bytes"))
    io = read_text(file("blkio", "blkio.throttle.io_service_bytes_recursive"))
    read, written = (None, None) if io is None else parse_io_v1(io)
    return Usage(
        cpu_s=None if cpu is None else cpu / 1e9,
        memory_bytes=None if memory is None else max(0, memory - cache),
        memory_limit_bytes=limit if limit is not None and limit < _V1_UNLIMITED_BYTES else None,
        pids=_number(file("pids", "pids.current")),
        io_read_bytes=read,
        io_write_bytes=written,
    )


def oom_kills_v2(directory: Path) -> int | None:
    return _flat(directory / "memory.events").get("oom_kill")


def oom_kills_v1(directory: Path) -> int | None:
    return _flat(directory / "memory.oom_control").get("oom_kill")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Of some processes: pages in memory, each shared one divided by the processes that have it mapped."""

    own_bytes: int  # that nobody else has: given back when they end
    shared_bytes: int  # their part of what others have too

    @property
    def pss_bytes(self) -> int:
        return self.own_bytes + self.shared_bytes


def parse_rollups(texts: Iterable[str]) -> ProcessMemory:
    """What the files smaps_rollup of some processes tell together.

    Anonymous pages can be common to a process and those it forked only: to the same instance's. So they are its own,
    be they private to a process or not. A page of a file, or of memory that is shared as one, may be anybody's: those
    that only these processes have in common count as shared, for their part.
    """
    rollups = [_parse_kib(text) for text in texts]

    def total(*names: str) -> int:
        return sum(rollup.get(name, 0) for rollup in rollups for name in names) << 10

    pss = total("Pss")
    own = min(pss, max(total("Private_Clean", "Private_Dirty"), total("Pss_Anon")))
    return ProcessMemory(own_bytes=own, shared_bytes=pss - own)


def memory_of(pids: Iterable[int]) -> ProcessMemory:
    """Blocks while the kernel looks at each page. Processes that have ended count nothing."""
    return parse_rollups(read_text(Path(f"/proc/{pid}/smaps_rollup")) or "" for pid in pids)


def _parse_kib(text: str) -> dict[str, int]:
    lines = (line.split() for line in text.splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) for fields in lines if len(fields) == 3 and fields[2] == "kB"}


def _flat(path: Path) -> dict[str, int]:
    return parse_flat(read_text(path) or "")


def _number(path: Path) -> int | None:
    text = read_text(path)
    return None if text is None or text.strip() == "max" else int(text)


def read_text(path: Path) -> str | None:
    """None if the file does not exist, or its cgroup or process ended while it was read.

    A threaded v2 cgroup answers EOPNOTSUPP for its processes: its parent lists them.
    """
    try:
        return path.read_text()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
