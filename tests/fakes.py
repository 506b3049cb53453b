"""A node without a kernel: images, volumes and networks in dictionaries, which outlive every daemon as a host does."""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from alveole.image.base import Format, Progress
from alveole.model.error import AlveoleError, ErrorCode, conflict, not_found
from alveole.model.image import DiskImage, ImageConfig, ImageContent, Recipe
from alveole.model.instance import Port
from alveole.model.network import Network
from alveole.model.template import Template
from alveole.model.volume import Volume
from alveole.network.base import Attachment
from alveole.runtime.base import Capability, Card, Cell, Handle, Ids, Workplace
from alveole.runtime.fake import FakeHost, FakeRuntime

T = TypeVar("T")
WALL = frozenset(
    {
        Capability.EXEC,
        Capability.ATTACH,
        Capability.USER_NAMESPACE,
        Capability.HOST_NETWORK,
        Capability.TEMPLATES,
    }
)
ID_RANGE = 65536


def content(digit: str = "1", *, command: tuple[str, ...] = ("serve",)) -> ImageContent:
    return ImageContent(
        digest=f"sha256:{digit * 64}",
        layers=(f"sha256:{digit * 63}0",),
        size_bytes=1000,
        config=ImageConfig(command=command),
    )


def disk(digit: str) -> ImageContent:
    """Of a whole operating system."""
    system = DiskImage(format="qcow2", virtual_size_bytes=1 << 30)
    return content(digit, command=()).replace(layers=(), disk=system)


class FakeImages:
    """``ImageStore`` whose registry is a dictionary. ``gate`` holds every fetch back while it is clear."""

    def __init__(self) -> None:
        self.registry: dict[str, ImageContent | AlveoleError] = {"docker.io/library/app:latest": content()}
        self.held: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def pull(self, reference: str, *, tls_verify: bool, progress: Progress) -> ImageContent:
        progress("layer 1/1")
        await self.gate.wait()
        found = self.registry.get(reference) or not_found(f"image {reference} does not exist in its registry")
        return self._keep(found)

    async def load(self, path: Path, format: Format, progress: Progress) -> ImageContent:  # noqa: A002
        await self.gate.wait()
        return self._keep(disk("2") if format in {"qcow2", "raw"} else content("2"))

    async def build(
        self, recipe: Recipe, directory: Path, base: ImageContent | None, *, use_cache: bool, progress: Progress
    ) -> ImageContent:
        await self.gate.wait()
        return self._keep(content("3", command=recipe.command or ("serve",)))

    def _keep(self, found: ImageContent | AlveoleError) -> ImageContent:
        if isinstance(found, AlveoleError):
            raise found
        self.held.add(found.digest)
        return found

    async def has(self, content: ImageContent) -> bool:
        return content.digest in self.held

    def layer_directories(self, content: ImageContent) -> tuple[Path, ...]:
        return tuple(Path("/layers") / layer for layer in content.layers)

    def disk_path(self, content: ImageContent) -> Path:
        return Path("/disks") / content.digest

    async def collect(self, used: Collection[ImageContent]) -> int:
        unused = self.held - {image.digest for image in used}
        self.held -= unused
        return 1000 * len(unused)


class FakeVolumes:
    """``VolumeDriver``. ``refuse`` is what the next creations fail with; ``gate`` holds them back while it is clear."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.disks: set[str] = set()
        self.mounted: set[str] = set()
        self.bases: set[str] = set()
        self.roots: set[str] = set()
        self.refuse: AlveoleError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def create(self, volume: Volume) -> None:
        await self.gate.wait()
        if self.refuse is not None:
            raise self.refuse
        self.disks.add(volume.id)

    async def ensure_mounted(self, volume: Volume) -> Path:
        if volume.id not in self.disks:
            raise not_found(f"volume {volume.name} has no disk")
        self.mounted.add(volume.id)
        return self._directory

    async def ensure_unmounted(self, volume_id: str) -> None:
        self.mounted.discard(volume_id)

    async def ensure_disk(self, volume: Volume) -> Path:
        if volume.id not in self.disks:
            raise not_found(f"volume {volume.name} has no disk")
        if volume.id in self.mounted:
            raise conflict(f"volume {volume.name} is mounted")
        return self._directory / f"{volume.id}.img"

    async def remove(self, volume_id: str) -> None:
        self.mounted.discard(volume_id)
        self.disks.discard(volume_id)

    async def base_disk(self, key: str, make: Callable[[Path], Awaitable[None]], *, need_bytes: int = 0) -> Path:
        self.bases.add(key)
        return self._directory / f"{key}.img"

    async def root_disk(self, instance_id: str, base: Path) -> Path:
        self.roots.add(instance_id)
        return self._directory / f"{instance_id}.img"

    async def copy_root_disk(self, source_id: str, instance_id: str, *, replace: bool = False) -> Path:
        return await self.root_disk(instance_id, self._directory / f"{source_id}.img")

    async def keep_volume(self, volume_id: str, copy_id: str) -> None:
        if volume_id not in self.disks:
            raise not_found(f"volume {volume_id} has no disk")
        self.roots.add(copy_id)

    async def restore_volume(self, copy_id: str, volume: Volume) -> None:
        if copy_id not in self.roots:
            raise not_found(f"disk {copy_id} is not there")
        if volume.id in self.mounted:
            raise conflict(f"volume {volume.name} is mounted")
        self.disks.add(volume.id)

    async def remove_root_disk(self, instance_id: str) -> None:
        self.roots.discard(instance_id)

    async def collect_bases(self, used_keys: Collection[str]) -> int:
        unused = self.bases - set(used_keys)
        self.bases -= unused
        return 1000 * len(unused)

    async def recover(self, volumes: Collection[Volume], instances: Collection[str]) -> None:
        self.disks &= {volume.id for volume in volumes}
        self.roots &= set(instances)

    async def close(self) -> None:
        return


class FakeTemplates:
    """``TemplatePool``. Every running instance shares the memory of the first. ``gate`` holds refreshes back."""

    def __init__(self) -> None:
        self.known: dict[str, Template] = {}
        self.workplaces: list[Workplace] = []
        self.gate = asyncio.Event()
        self.gate.set()

    def add(self, key: str) -> Template:
        moment = datetime(2026, 1, 31, tzinfo=UTC)
        self.known[key] = Template(
            key=key,
            memory_bytes=512 << 20,
            cpus=1,
            tty=False,
            accelerator="tcg",
            kernel="6.12",
            qemu="10.0",
            size_bytes=1000,
            created_at=moment,
            used_at=moment,
            boot_s=5.0,
            cause="wanted",
            checked=True,
            instances=0,
        )
        return self.known[key]

    async def shown(self, running: Collection[Handle]) -> tuple[Template, ...]:
        first = min(self.known, default="")
        return tuple(
            template.replace(instances=len(running) if key == first else 0) for key, template in self.known.items()
        )

    async def remove(self, key: str) -> tuple[int, int]:
        return (600, 400) if self.known.pop(key, None) else (0, 0)

    async def refresh(self, key: str, workplace: Workplace, card: Card) -> None:
        self.workplaces.append(workplace)
        await self.gate.wait()
        self.known[key] = self.known[key].replace(cause="refreshed")


_CARD = Card(
    device="tap0",
    mac="02:00:00:00:00:04",
    address="192.0.0.2",
    gateway="192.0.0.1",
    gateway_mac="02:00:00:00:00:03",
    control_address="169.254.0.2",
    control_gateway="169.254.0.1",
    has_route=False,
)


class FakeNetwork:
    """``NetworkDriver``."""

    def __init__(self) -> None:
        self.attachments: dict[str, Attachment] = {}
        self.ranges: set[int] = set()

    async def open(self) -> None:
        return

    async def attach(
        self,
        *,
        instance_id: str,
        project: str,
        name: str,
        hostname: str,
        network: Network | None,
        mode: str,
        address: str,
        ports: tuple[Port, ...],
        ids: Ids | None,
        shifted: bool,
        machine: str = "",
        receive_bps: int | None = None,
        send_bps: int | None = None,
    ) -> Attachment:
        self._refuse_taken(instance_id, address, ports)
        base = ids.base if ids else self._range() if shifted else 0
        attachment = Attachment(
            instance_id=instance_id,
            name=name,
            hostname=hostname,
            project=project,
            user_namespace="/namespaces/user" if shifted else "",
            network_namespace="" if mode == "host" else "/namespaces/net",
            ids_base=base,
            interface="",
            network_id=network.id if network else "",
            subnet=network.subnet if network else "",
            internal=network.internal if network else False,
            address=address,
            ports=ports,
            card=_CARD if machine else None,
        )
        self.attachments[instance_id] = attachment
        return attachment

    def _refuse_taken(self, instance_id: str, address: str, ports: tuple[Port, ...]) -> None:
        for other in self.attachments.values():
            if other.instance_id == instance_id:
                continue
            assert not address or other.address != address, "two instances have one address"
            taken = {port.host_port for port in other.ports} & {port.host_port for port in ports}
            if taken:
                raise AlveoleError(ErrorCode.EXISTS, f"host port {min(taken)} is taken by {other.name}")

    def _range(self) -> int:
        base = next(number * ID_RANGE for number in range(1, 10_000) if number * ID_RANGE not in self.ranges)
        self.ranges.add(base)
        return base

    async def detach(self, attachment: Attachment, *, keep_ids: bool) -> None:
        self.attachments.pop(attachment.instance_id, None)
        if not keep_ids:
            self.ranges.discard(attachment.ids_base)

    async def release_ids(self, ids: Ids) -> None:
        self.ranges.discard(ids.base)

    async def recover(self, attachments: Collection[Attachment], reserved: Collection[Ids]) -> None:
        self.attachments = {attachment.instance_id: attachment for attachment in attachments}
        self.ranges = {ids.base for ids in reserved}

    async def repair(self) -> None:
        return

    def resolv_conf(self, attachment: Attachment) -> str:
        return "nameserver 10.64.0.1\n"

    async def close(self, *, keep: bool) -> None:
        return


class WatchedRuntime(FakeRuntime):
    """Tells when a process was replaced while it ran: nobody asked for its end."""

    def __init__(self, host: FakeHost, doubled: list[str], templates: FakeTemplates) -> None:
        super().__init__(host, capabilities=WALL)
        self._doubled = doubled
        self.templates = templates

    async def create(self, cell: Cell) -> Handle:
        if cell.id in running(self._host):
            self._doubled.append(cell.id)
        return await super().create(cell)


def running(host: FakeHost) -> set[str]:
    """Instances whose process runs now."""
    return {name for name, task in host.tasks.items() if task.started_at is not None and task.look() is None}


def mortal(target: T, is_alive: Callable[[], bool], pause: Callable[[], float]) -> T:
    """``target`` as a process sees it that may be killed: each effect takes time, and none happens after its death."""
    return cast("T", _Mortal(target, is_alive, pause))


class _Mortal:
    def __init__(self, target: Any, is_alive: Callable[[], bool], pause: Callable[[], float]) -> None:
        self._target, self._is_alive, self._pause = target, is_alive, pause

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        return self._bound(method) if inspect.iscoroutinefunction(method) else method

    def _bound(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        async def call(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(self._pause())
            if not self._is_alive():
                raise asyncio.CancelledError
            return await method(*args, **kwargs)

        return call
