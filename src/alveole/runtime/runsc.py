"""gVisor's runsc: sandboxes. An application kernel of its own stands between the instance and the host's kernel.

Its kernel does what seccomp, masks, device rules and the user namespace do for a container; it drops its own
privileges on the host. So it takes none of these, and its files keep their owners unshifted.
"""

from pathlib import Path
from typing import Any

from alveole.host.process import run
from alveole.model.error import AlveoleError
from alveole.runtime.base import Capability
from alveole.runtime.bundle import Engine

_TIMEOUT_S = 10.0
_HIDE_SYSCTL = 'mount --bind "$1" /proc/sys/net && shift && exec "$@"'


class Runsc:
    name = "runsc"
    program = "runsc"
    # overlay2=none: what an instance writes goes to its root directory, and is there after a restart.
    # net-disconnect-ok: one with connections can be captured; they end.
    options: tuple[str, ...] = ("--platform=systrap", "--network=sandbox", "--overlay2=none", "--net-disconnect-ok")
    bundle = Engine(host_kernel=False, read_only_option="ro")
    capabilities = frozenset(
        {
            Capability.EXEC,
            Capability.ATTACH,
            Capability.PAUSE,
            Capability.ROOT_DIRECTORY,
            Capability.FORK,
        }
    )
    exec_pid_option = "--internal-pid-file"
    exec_pid_is_inside = True
    exec_console_socket = False

    def __init__(self, empty_directory: Path) -> None:
        """``empty_directory`` exists and stays empty."""
        self._empty_directory = empty_directory
        self._prefix: tuple[str, ...] | None = None

    async def probe(self) -> str:
        try:
            await run([self.program, *self.options, "--version"], timeout_s=_TIMEOUT_S)  # does it know them all?
            await self.start_prefix()
        except AlveoleError as error:
            return str(error)
        return ""

    def seccomp(self, capabilities: frozenset[str]) -> dict[str, Any]:
        return {}

    def created(self, capabilities: frozenset[str], state: Path) -> None:
        """Nothing to keep."""

    async def start_prefix(self) -> tuple[str, ...]:
        """What ``start`` must be run under so that runsc sees no network sysctls where this host shows them.

        It takes a namespace that has net.core.rmem_default for the host's own and refuses to work in it. Since Linux
        6.11 every namespace has it (gVisor issue 10704, fixed in August 2024).
        """
        if self._prefix is None:
            look = ["unshare", "--net", "test", "-e", "/proc/sys/net/core/rmem_default"]
            shown = (await run(look, timeout_s=_TIMEOUT_S, check=False)).code == 0
            hidden = (
                "unshare",
                "--mount",
                "--propagation",
                "slave",
                "sh",
                "-c",
                _HIDE_SYSCTL,
                "sh",
                str(self._empty_directory),
            )
            self._prefix = hidden if shown else ()
        return self._prefix
