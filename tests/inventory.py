"""What Alveole may leave on a host, read from the host alone: this file imports nothing of Alveole.

``python tests/inventory.py`` prints it as JSON.
"""

import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

PROGRAMS = frozenset(
    [
        "alveole",
        "conmon",
        "crun",
        "runsc",
        "runsc-sandbox",
        "runsc-gofer",
        "docker-registry",
        "registry",
        "skopeo",
        "mmdebstrap",
        "qemu-system-x86_64",
        "qemu-system-x86",  # the same as the kernel names it, which knows 15 characters
    ]
)
"""Programs that run because of Alveole or its tests."""

FIRST_SHIFTED_ID = 1 << 28  # processes of instances have such user ids
_ZOMBIE = re.compile(r"\d+ \(zombie\) ")  # one of an earlier test, which its parent takes note of when it comes to it
_PLACES = ("/run", "/var/lib", "/var/log", "/tmp", "/dev/shm")


@dataclass(frozen=True, slots=True)
class Inventory:
    """Each field holds readable lines, one a thing."""

    processes: frozenset[str]
    devices: frozenset[str]  # network devices
    namespaces: frozenset[str]  # pinned by a mount
    mounts: frozenset[str]
    tables: frozenset[str]  # of nftables, with the number of elements of each set and map of ours
    cgroups: frozenset[str]
    loops: frozenset[str]
    files: frozenset[str]
    routes: frozenset[str]
    rules: frozenset[str]
    neighbours: frozenset[str]
    sysctls: frozenset[str]


def take() -> Inventory:
    mounts = list(_mounts())
    return Inventory(
        processes=frozenset(_processes()),
        devices=frozenset(str(link["ifname"]) for link in _ip("link")),
        namespaces=frozenset(target for target, kind, _ in mounts if kind == "nsfs"),
        mounts=frozenset(
            f"{target} {kind} {source}"
            for target, kind, source in mounts
            if kind != "nsfs" and not target.startswith(("/proc/", "/sys/kernel/"))
        ),
        tables=frozenset(_tables()),
        cgroups=frozenset(_cgroups()),
        loops=frozenset(_loops()),
        files=frozenset(_files()),
        routes=frozenset(_described(_ip("route", "show", "table", "all")) | _described(_ip("-6", "route", "show"))),
        rules=frozenset(_described(_ip("rule")) | _described(_ip("-6", "rule"))),
        neighbours=frozenset(_described(_ip("neigh", "show", "nud", "permanent"))),
        sysctls=frozenset(_sysctls()),
    )


def difference(before: Inventory, after: Inventory) -> list[str]:
    """One readable line for each thing that appeared or vanished."""
    lines = []
    for field in fields(Inventory):
        old, new = getattr(before, field.name), getattr(after, field.name)
        lines += [f"{field.name}: left over: {item}" for item in sorted(new - old)]
        lines += [f"{field.name}: vanished: {item}" for item in sorted(old - new) if not _ZOMBIE.match(item)]
    return lines


def _processes() -> Iterator[str]:
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            argv = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
            uid = directory.stat().st_uid
            cgroups = (directory / "cgroup").read_text()
            stat = (directory / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        name, state = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2]
        if is_program(argv) or name in PROGRAMS or uid >= FIRST_SHIFTED_ID or "/alveole-" in cgroups:
            shown = " ".join(argv).strip() or name
            yield f"{directory.name} {'(zombie) ' if state == 'Z' else ''}{shown}"


def is_program(argv: list[str]) -> bool:
    """Run by name, by ``-m alveole.x``, by ``-c`` naming it, or as a script of the package."""
    if Path(argv[0]).name in PROGRAMS:
        return True
    if not Path(argv[0]).name.startswith("python"):
        return False
    for flag, value in itertools.pairwise(argv):
        if (flag == "-m" and re.match(r"alveole(\.|$)", value)) or (flag == "-c" and "alveole." in value):
            return True
    script = next((argument for argument in argv[1:] if not argument.startswith("-")), "")
    return Path(script).name == "alveole" or "/src/alveole/" in script


def _mounts() -> Iterator[tuple[str, str, str]]:
    """(mount point, filesystem type, source) of every mount this process sees."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        kind, source = right.split(" ")[:2]
        yield left.split(" ")[4], kind, source


def _tables() -> Iterator[str]:
    for item in _json("nft", "-j", "list", "tables").get("nftables", []):
        if table := item.get("table"):
            yield f"{table['family']} {table['name']}"
            if "alveole" in table["name"]:
                yield from _elements(table["family"], table["name"])


def _elements(family: str, table: str) -> Iterator[str]:
    for item in _json("nft", "-j", "list", "table", family, table).get("nftables", []):
        for kind in ("set", "map"):
            if found := item.get(kind):
                yield f"{family} {table} {kind} {found['name']}: {len(found.get('elem', ()))} elements"


def _cgroups() -> Iterator[str]:
    for target, kind, _ in _mounts():
        if kind not in {"cgroup", "cgroup2"}:
            continue
        for directory, children, _ in os.walk(target):
            yield from (f"{directory}/{child} ({kind})" for child in children if "alveole" in f"{directory}/{child}")


def _loops() -> Iterator[str]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            yield f"{path.parts[3]} {path.read_text().strip()}"
        except OSError:  # detached since it was listed
            continue


def _files() -> Iterator[str]:
    """Entries of the usual places named after Alveole, two levels below its own directories in /run."""
    for place in map(Path, _PLACES):
        for path in place.glob("*alveole*"):
            yield str(path)
            if place == Path("/run"):
                yield from (str(below) for below in (*path.glob("*"), *path.glob("*/*")))


def _sysctls() -> Iterator[str]:
    for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/route_localnet"):
        path = Path("/proc/sys", name)
        if path.exists():
            yield f"{name} = {path.read_text().strip()}"


def _described(items: list[dict[str, object]]) -> set[str]:
    changing = {"expires", "cacheinfo", "used", "confirmed", "updated", "metrics"}
    return {" ".join(f"{key} {value}" for key, value in item.items() if key not in changing) for item in items}


def _ip(*arguments: str) -> list[dict[str, object]]:
    found = _json("ip", "-j", *arguments)
    return found if isinstance(found, list) else []


def _json(*argv: str) -> Any:
    done = subprocess.run(argv, check=True, capture_output=True, timeout=30)
    return json.loads(done.stdout or b"[]")


if __name__ == "__main__":
    print(json.dumps({name: sorted(lines) for name, lines in asdict(take()).items()}, indent=2))
