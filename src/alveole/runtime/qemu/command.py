"""Running a command in a machine: its specification goes by the control port, its streams by SSH.

The guest's SSH server listens on an address that only the machine's own network namespace reaches, and lets in the
key that was made for this machine.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alveole.runtime.qemu.guest import Guest

_OPTIONS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=no",  # nobody else can be at the other end
    "UserKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
    "ConnectTimeout=20",
    "IdentitiesOnly=yes",
    "RequestTTY=auto",
    "EscapeChar=none",
)
# A connection does not notice that nobody is at its other end: the kernel ends it with the process namespace of the
# machine, and with the daemon.
_DIE_WITH_PARENT = ("setpriv", "--pdeathsig=KILL")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestLauncher:
    """Implements alveole.runtime.execution.Launcher."""

    id: str
    name: str  # of the command: hex digits
    guest: Guest
    machine_pid: int
    address: str
    key: Path

    @property
    def console_socket(self) -> None:
        return None

    async def prepare(self, specification: dict[str, Any]) -> None:
        self.guest.forget_commands()
        content = json.dumps(specification).encode()
        await self.guest.send(f"command {self.name} {len(content)}", content)

    def argv(self, *, tty: bool) -> tuple[str, ...]:
        namespaces = f"/proc/{self.machine_pid}/ns"
        return (
            *(*_DIE_WITH_PARENT, "nsenter", f"--net={namespaces}/net", f"--pid={namespaces}/pid"),
            *(*_DIE_WITH_PARENT, "ssh", "-F", "/dev/null", "-i", str(self.key), "-tt" if tty else "-T"),
            *(word for option in _OPTIONS for word in ("-o", option)),
            *(f"root@{self.address}", f"run-command {self.name}"),
        )

    def has_started(self) -> bool:
        return self.guest.has_command_started(self.name)

    async def kill(self) -> None:
        await self.guest.send(f"kill {self.name}")

    def forget(self) -> None:
        """The guest removes what it has of it."""
