"""What a sandbox is at one moment, taken while it stands still; and another sandbox going on from there.

Its kernel writes itself, all processes and their memory into files, and is read back from them into a sandbox that was
made but not started. What is the host's is not in the files: the root directory and what is bound into it, the device
of the network, the monitor's pipes. A clone has its own of these; its directories must hold what the original's held.
"""

import asyncio
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from alveole.host import pidfd
from alveole.host.blocking import in_thread, to_its_end
from alveole.host.cgroup import Cgroups
from alveole.host.netlink import new_address
from alveole.host.netns import addresses_inside, netlink_inside
from alveole.model.agent import ExecRequest, Stream
from alveole.model.base import Record
from alveole.model.error import conflict, internal
from alveole.runtime import runsc_image
from alveole.runtime.base import Cell, Handle, Process, State
from alveole.runtime.conmon import Place
from alveole.runtime.oci import OciRuntime, place_of
from alveole.runtime.renewal import program
from alveole.runtime.runsc import Runsc
from alveole.runtime.runsc_image import About
from alveole.runtime.runsc_words import capture_fault, is_connecting, restore_fault, said, words_of

_IMAGE_TIMEOUT_S = 300.0  # to write or read all memory
_QUIET_TIMEOUT_S = 10.0
_POLL_S = 0.02
_DEVICE = 2  # inside: the loopback is 1
_PAUSES_S = (0.05, 0.2, 0.5, 1.0)


class Addresses(Record):
    """IPv4 addresses of one sandbox."""

    own: tuple[str, ...]
    former: tuple[str, ...]  # that those had which it was cloned from, and that its sockets may be bound to


class RunscRuntime(OciRuntime):
    """Implements alveole.runtime.base.Runtime and Capturing."""

    def __init__(self, flavour: Runsc, cgroups: Cgroups, clock: Callable[[], float] = time.time) -> None:
        super().__init__(flavour, cgroups, clock)
        self._capturing = defaultdict[str, asyncio.Lock](asyncio.Lock)  # by instance
        self._starting = defaultdict[str, int](int)  # commands, by instance

    # --- capturing ---------------------------------------------------------------------------------------------------

    async def capture(
        self, handle: Handle, directory: Path, while_still: Callable[[], Awaitable[None]], *, go_on: bool
    ) -> Mapping[str, Any]:
        place = place_of(handle)
        async with self._capturing[place.id]:
            await self._until_no_command_runs(place)
            try:
                began = await self._write(place, directory)
                await while_still()
                completing = asyncio.ensure_future(in_thread(partial(self._complete, place, directory)))
                try:
                    if go_on:
                        await self._go_on(place)
                    still_s = time.monotonic() - began
                finally:
                    await completing
            except BaseException:
                await self._go_on(place)
                raise
        return {"still_s": still_s, "private_bytes": runsc_image.size_bytes(directory)}

    async def _until_no_command_runs(self, place: Place) -> None:
        """What a command run by ``exec`` has open leads to whoever called it, and so cannot be captured."""
        try:
            async with asyncio.timeout(_QUIET_TIMEOUT_S):
                while self._starting[place.id] or await in_thread(partial(_has_commands, place)):  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_S)  # other processes are waited for
        except TimeoutError as error:
            raise conflict(
                f"a command is being run in instance {place.id}, which cannot be captured meanwhile",
                hint="end what was started with alveole exec",
            ) from error

    async def _write(self, place: Place, directory: Path) -> float:
        """Let it stand still and write itself. A connection that is just being made hinders it: then try again.

        Returns since when it stands still.
        """
        options = ("--leave-running", "--compression=none", f"--image-path={directory}")
        pauses_s = iter(_PAUSES_S)
        while True:
            began = time.monotonic()
            await self._pause(place)
            result = await to_its_end(self._run(place, "checkpoint", *options, place.id, timeout_s=_IMAGE_TIMEOUT_S))
            if result.code == 0:
                return began
            pause_s = next(pauses_s, None)
            if pause_s is None or not is_connecting(words_of(result)):
                raise capture_fault(place.id, words_of(result), room_bytes=runsc_image.room_bytes(directory))
            await self._go_on(place)
            await in_thread(partial(runsc_image.empty, directory))
            await asyncio.sleep(pause_s)

    async def _pause(self, place: Place) -> None:
        result = await to_its_end(self._run(place, "pause", place.id))
        if result.code == 0:
            return
        status = await self._status(place)
        if status in {"stopped", ""}:
            raise conflict(f"instance {place.id} does not run any more", hint="start it first")
        if status != "paused":
            raise result.failure()

    async def _go_on(self, place: Place) -> None:
        """Nothing happens to one that runs, or has ended."""
        result = await to_its_end(self._run(place, "resume", place.id))
        if result.code != 0 and await self._status(place) == "paused":
            raise result.failure()

    def _complete(self, place: Place, directory: Path) -> None:
        if runsc_image.has_strangers((directory / runsc_image.STATE).read_bytes()):
            raise conflict(
                f"something that a command left in instance {place.id} has the command's output open, "
                "so it cannot be captured",
                hint="end what was started with alveole exec, or start it with its output sent to a file",
            )
        config = json.loads((place.bundle / "config.json").read_bytes())
        had = _addresses(place)
        about = About(
            engine=self._build(),
            hostname=config["hostname"],
            addresses=had.own + had.former,
            tty=config["process"]["terminal"],
            binds=tuple(mount["destination"] for mount in config["mounts"] if mount["type"] == "bind"),
        )
        (directory / runsc_image.ABOUT).write_bytes(about.to_json())
        runsc_image.sync(directory)

    def _build(self) -> str:
        """Of the engine."""
        found = Path(self._program).stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    # --- going on ----------------------------------------------------------------------------------------------------

    async def _create(self, cell: Cell, place: Place) -> Handle:
        former: tuple[str, ...] = ()
        begin = _beginning(place)
        await in_thread(partial(shutil.rmtree, begin, ignore_errors=True))  # of a create that was cut short
        if cell.origin is not None:
            about = runsc_image.about(cell.origin)
            self._check(cell, about)
            await in_thread(partial(runsc_image.link_all, cell.origin, begin))
            former = about.addresses
        handle = await super()._create(cell, place)
        addresses = await in_thread(partial(_take_addresses, cell.network_namespace, former))
        _addresses_file(place).write_bytes(addresses.to_json())
        return handle

    def _check(self, cell: Cell, about: About) -> None:
        if about.engine != self._build():
            raise conflict(
                f"what was captured for instance {cell.id} was written by another version of {self.name}",
                hint="recreate the instance",
            )
        binds = {mount.target for mount in cell.mounts if mount.source is not None}
        if cell.process.tty != about.tty or binds != set(about.binds):
            raise conflict(f"instance {cell.id} has other mounts or another terminal than the one it was captured from")

    async def start(self, handle: Handle) -> None:
        place = place_of(handle)
        begin = _beginning(place)
        if not runsc_image.is_there(begin):
            await super().start(handle)
            return
        await self._restore(place, begin)
        await self._renew(place, runsc_image.about(begin))
        await in_thread(partial(runsc_image.forget, begin))

    async def _restore(self, place: Place, begin: Path) -> None:
        prefix = await self._flavour.start_prefix()
        arguments = ("restore", "--detach", f"--image-path={begin}", place.id)
        result = await to_its_end(self._run(place, *arguments, prefix=prefix, timeout_s=_IMAGE_TIMEOUT_S))
        if result.code != 0 and await self._status(place) != "running":
            raise restore_fault(place.id, words_of(result))

    async def _renew(self, place: Place, about: About) -> None:
        """Its host name and addresses are in its kernel, which is the captured one."""
        hostname = json.loads((place.bundle / "config.json").read_bytes())["hostname"]
        had = _addresses(place)
        if hostname == about.hostname and not had.former:
            return
        file = place.bundle / "renewal"
        file.write_bytes(program(hostname, _DEVICE, had.former))
        file.chmod(0o755)
        with file.open("rb") as opened:
            number = opened.fileno()
            options = ("--exec-fd", str(number), "--user=0:0", "--cap=CAP_SYS_ADMIN", "--cap=CAP_NET_ADMIN", "--cwd=/")
            result = await to_its_end(self._run(place, "exec", *options, place.id, "renewal", pass_fds=(number,)))
        file.unlink()
        if result.code != 0 and await self._status(place) == "running":
            why = said(words_of(result)) or f"error {result.code}"
            raise internal(f"instance {place.id} could not be given its host name and address: {why}")

    async def _adopt(self, place: Place, status: str) -> State:
        if runsc_image.is_there(_beginning(place)):
            return State.CREATED  # its start was cut short
        if status == "paused":
            await self._go_on(place)  # a daemon that captured it died
        return await super()._adopt(place, status)

    async def signal(self, handle: Handle, signal: int) -> None:
        await self._until_it_goes_on(handle)  # the engine refuses it meanwhile
        await super().signal(handle, signal)

    async def _until_it_goes_on(self, handle: Handle) -> None:
        captured = self._capturing[handle.id]
        while captured.locked():
            async with captured:
                """And on to the next capture, if one is waiting."""

    async def delete(self, cell_id: str, directory: Path, run_directory: Path, cgroup: str) -> None:
        await super().delete(cell_id, directory, run_directory, cgroup)
        begin = _beginning(Place(cell_id, directory, run_directory))
        await in_thread(partial(shutil.rmtree, begin, ignore_errors=True))
        self._capturing.pop(cell_id, None)
        self._starting.pop(cell_id, None)

    async def exec(self, handle: Handle, request: ExecRequest, process: Process) -> Stream:
        await self._until_it_goes_on(handle)
        self._starting[handle.id] += 1
        try:
            return await super().exec(handle, request, process)
        finally:
            self._starting[handle.id] -= 1


def _beginning(place: Place) -> Path:
    """What it goes on from when it is started; gone once it has."""
    return place.directory / "begin"


def _addresses_file(place: Place) -> Path:
    return place.bundle / "addresses"


def _addresses(place: Place) -> Addresses:
    """None of a sandbox that an older daemon made."""
    try:
        return Addresses.from_json(_addresses_file(place).read_bytes())
    except FileNotFoundError:
        return Addresses(own=(), former=())


def _take_addresses(namespace: Path | None, former: tuple[str, ...]) -> Addresses:
    """Give its device the addresses that those had which it was cloned from, behind its own.

    Its kernel cannot be read back if a socket is bound to an address that is not there.
    """
    present = addresses_inside(namespace) if namespace else []
    own = tuple(address for _, address in present)
    lacking = tuple(address for address in former if address not in own) if present else ()
    if namespace and lacking:
        with netlink_inside(namespace) as inside:
            index = inside.index_of(present[0][0])
            inside.send([new_address(index, address) for address in lacking])
    return Addresses(own=own, former=lacking)


def _has_commands(place: Place) -> bool:
    """Whether commands run in it. Each has a file, which may be left over from a daemon that died."""
    return any(pidfd.with_arguments(str(file)) for file in place.bundle.glob("exec-*.json"))
