"""The programs Alveole drives: present, their versions, and known faults."""

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from alveole.host.probe.finding import INSTALL, Finding, Status, needs_root
from alveole.host.process import run
from alveole.model.error import AlveoleError, ErrorCode

TIMEOUT_S = 5.0
SECCOMP_PROFILE = Path("/usr/share/containers/seccomp.json")
VISIBLE_SINCE_6_11 = Path("/proc/sys/net/core/rmem_default")
RUNSC_REPAIRED = 20240815
BACKPORTS = "from bookworm-backports"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    argv: tuple[str, ...]  # prints the version
    package: str  # empty: not to be installed for Alveole's sake
    needed: bool
    oldest: tuple[int, ...]  # version known to work
    purpose: str  # "it ..."
    without: str
    origin: str = ""  # where its package comes from, if not from Debian 12 itself

    @property
    def name(self) -> str:
        return self.argv[0]


PROGRAMS = (
    Program(
        argv=("crun", "--version"),
        package="crun",
        needed=True,
        oldest=(1, 8),
        purpose="it runs containers",
        without="containers cannot run",
    ),
    Program(
        argv=("conmon", "--version"),
        package="conmon",
        needed=True,
        oldest=(2, 1),
        purpose="it keeps containers and their logs while the daemon restarts",
        without="containers cannot run",
    ),
    Program(
        argv=("runsc", "--version"),
        package="runsc",
        needed=False,
        oldest=(0, 0, 20230000),
        purpose="it runs sandboxes",
        without="sandboxes cannot run; containers can",
        origin=BACKPORTS,
    ),
    Program(
        argv=("skopeo", "--version"),
        package="skopeo",
        needed=False,
        oldest=(1, 9),
        purpose="it pulls images from registries",
        without="images cannot be pulled; they can be built and loaded",
    ),
    Program(
        argv=("mmdebstrap", "--version"),
        package="mmdebstrap",
        needed=False,
        oldest=(1, 5),
        purpose="it builds Debian images",
        without="recipes based on Debian packages cannot be built",
        origin=BACKPORTS,
    ),
    Program(
        argv=("mkfs.xfs", "-V"),
        package="xfsprogs",
        needed=False,
        oldest=(5, 0),
        purpose="it makes the pool that volumes live in",
        without="volumes cannot be made on a host without reflink",
    ),
    Program(
        argv=("mkfs.ext4", "-V"),
        package="e2fsprogs",
        needed=False,
        oldest=(1, 45),
        purpose="it formats volumes",
        without="volumes cannot be made",
    ),
    Program(
        argv=("qemu-img", "--version"),
        package="qemu-utils",
        needed=False,
        oldest=(7, 2),
        purpose="it reads disk images",
        without="qcow2 images cannot be imported; raw ones can",
    ),
    Program(
        argv=("xorriso", "-version"),
        package="xorriso",
        needed=False,
        oldest=(1, 5),
        purpose="it makes the seeds that operating systems are set up by at their first boot",
        without="operating systems of disk images cannot be told their name, address and keys",
    ),
    Program(
        argv=("ip", "-V"),
        package="iproute2",
        needed=True,
        oldest=(6, 0),
        purpose="it makes network devices and routes",
        without="instances cannot have networks",
    ),
    Program(
        argv=("qemu-system-x86_64", "--version"),
        package="",
        needed=False,
        oldest=(7, 2),
        purpose="it runs virtual machines, which this version of Alveole does not offer",
        without="nothing is lost: this version of Alveole does not run virtual machines",
    ),
)


async def programs() -> list[Finding]:
    return list(await asyncio.gather(*(_look(program) for program in PROGRAMS)))


async def _look(program: Program) -> Finding:
    try:
        done = await run(program.argv, timeout_s=TIMEOUT_S)
    except AlveoleError as error:
        return judge(program, "not installed" if error.code is ErrorCode.UNSUPPORTED else error.message, None)
    text = (done.text + done.stderr.decode(errors="replace")).strip()
    return judge(program, text, version(text))


def version(text: str) -> tuple[int, ...] | None:
    """The first dotted number in what a program says about itself: "runsc version 0.0~20240729.0"."""
    match = re.search(r"\d+(?:[.~]\d+)+", text)
    return tuple(int(part) for part in re.split("[.~]", match[0])) if match else None


def judge(program: Program, said: str, found: tuple[int, ...] | None) -> Finding:
    """``found`` None: the program could not tell its version, and ``said`` is why."""
    fix = f"install {program.package} {program.origin}".strip() if program.package else ""
    first_line = said.partition("\n")[0]
    if found is None:
        return Finding(
            name=program.name,
            status=Status.MISSING,
            needed=program.needed,
            found=first_line,
            means=program.without,
            fix=fix,
            command=f"{INSTALL} {program.package}" if program.package else "",
        )
    if found < program.oldest:
        oldest = ".".join(map(str, program.oldest))
        return Finding(
            name=program.name,
            status=Status.WARN,
            needed=program.needed,
            found=first_line,
            means=f"{program.purpose}; older than {oldest}, the oldest that Alveole was tested with",
            fix=fix,
        )
    return Finding(name=program.name, status=Status.OK, needed=program.needed, found=first_line, means=program.purpose)


async def sandbox_network() -> Finding | None:
    """Whether this runsc refuses this kernel's network namespaces (gVisor issue 10704). None: there is no runsc."""
    if skipped := needs_root("runsc network", needed=False):
        return skipped
    try:
        said = (await run(["runsc", "--version"], timeout_s=TIMEOUT_S)).text
        read = await run(["unshare", "--net", "cat", str(VISIBLE_SINCE_6_11)], timeout_s=TIMEOUT_S, check=False)
    except AlveoleError:
        return None
    return judge_sandbox_network(said, visible=read.code == 0)


def judge_sandbox_network(said: str, *, visible: bool) -> Finding:
    """``said``: the output of runsc --version. ``visible``: a new network namespace has VISIBLE_SINCE_6_11."""
    date = re.search(r"\b20\d{6}\b", said)
    faulty = visible and date is not None and int(date[0]) < RUNSC_REPAIRED
    return Finding(
        name="runsc network",
        status=Status.OK,
        needed=False,
        found=f"runsc of {date[0] if date else 'unknown date'}, {VISIBLE_SINCE_6_11.name} "
        f"{'visible' if visible else 'hidden'} in network namespaces",
        means="this runsc refuses networks on kernels from 6.11 on; Alveole starts it with /proc/sys/net hidden"
        if faulty
        else "sandboxes have networks",
    )


def seccomp() -> Finding:
    if SECCOMP_PROFILE.exists():
        return Finding(
            name="seccomp profile",
            status=Status.OK,
            needed=True,
            found=str(SECCOMP_PROFILE),
            means="containers are refused the system calls that no ordinary program needs",
        )
    return Finding(
        name="seccomp profile",
        status=Status.MISSING,
        needed=True,
        found=f"{SECCOMP_PROFILE} does not exist",
        means="containers would be allowed every system call: they are not started",
        fix="install golang-github-containers-common",
        command=f"{INSTALL} golang-github-containers-common",
    )
