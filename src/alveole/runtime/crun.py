"""crun: containers on the host's kernel."""

import base64
import shutil
from pathlib import Path
from typing import Any

from alveole.host.process import run
from alveole.host.sealed import sealed_copy
from alveole.model.error import AlveoleError
from alveole.runtime.base import Capability
from alveole.runtime.bundle import Engine
from alveole.runtime.seccomp import host_seccomp, load_profile

_VERSION_TIMEOUT_S = 10.0


class Crun:
    name = "crun"
    options: tuple[str, ...] = ()
    bundle = Engine(host_kernel=True, read_only_option="rro")
    capabilities = frozenset(
        {
            Capability.EXEC,
            Capability.ATTACH,
            Capability.PAUSE,
            Capability.ROOT_DIRECTORY,
            Capability.USER_NAMESPACE,
            Capability.HOST_NETWORK,
            Capability.IO_LIMITS,
        }
    )
    exec_pid_option = "--pid-file"
    exec_pid_is_inside = False
    exec_console_socket = True

    def __init__(self, run: Path) -> None:
        """``run`` is a directory that ends with the host's boot at the latest.

        So that no instance can change it, crun runs itself anew from a copy each time it is called, unless it is one.
        Half of the time of a call went into that.
        """
        found = shutil.which("crun")
        self.program = str(sealed_copy(Path(found), run / "crun")) if found else "crun"
        self._compiled: dict[frozenset[str], str] = {}

    async def probe(self) -> str:
        try:
            version = (await run([self.program, "--version"], timeout_s=_VERSION_TIMEOUT_S)).text
            load_profile()
        except AlveoleError as error:
            return str(error)
        return "" if "+SECCOMP" in version else "crun was built without seccomp (install the distribution's crun)"

    def seccomp(self, capabilities: frozenset[str]) -> dict[str, Any]:
        """Compiling the rules takes crun longer (14 ms) than all else it does: done once, then handed over compiled."""
        if compiled := self._compiled.get(capabilities):
            return {"annotations": {"run.oci.seccomp_bpf_data": compiled}}
        return {"linux": {"seccomp": host_seccomp(capabilities)}}

    def created(self, capabilities: frozenset[str], state: Path) -> None:
        """Keep the filter that crun compiled and left in its state directory for ``exec``."""
        if capabilities not in self._compiled:
            self._compiled[capabilities] = base64.b64encode((state / "seccomp.bpf").read_bytes()).decode()

    async def start_prefix(self) -> tuple[str, ...]:
        return ()
