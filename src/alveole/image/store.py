"""The image store of one node, on a local directory."""

import asyncio
import errno
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from weakref import WeakValueDictionary

from alveole.host import process
from alveole.host.blocking import in_thread
from alveole.image.base import Format, Progress
from alveole.image.disk_image import NOBODY, make_raw, take_copy
from alveole.image.fetch import architecture, archive_error, fetch, registry_error
from alveole.image.flight import FRESH_S, Flight, Flights
from alveole.image.oci import (
    DOCUMENT_LIMIT_BYTES,
    Configuration,
    Descriptor,
    Manifest,
    config_descriptor,
    make_configuration,
    make_manifest,
    parse_configuration,
    parse_index,
    parse_manifest,
)
from alveole.image.shelf import LayerRecord, Shelf, blob_key, disk_key, layer_key
from alveole.image.tape import Limits
from alveole.image.unpack import Report
from alveole.model.error import AlveoleError, exhausted, internal, invalid, not_found, unsupported
from alveole.model.image import DiskFormat, DiskImage, ImageConfig, ImageContent
from alveole.model.reference import normalise

COPY_TIMEOUT_S = 3600.0
UNPACK_TIMEOUT_S = 3600.0
"""Beyond ``Limits.cpu_s`` only a disk that hangs takes so long."""

_NO_SPACE = "no space left on device"  # as programs print it


class LocalImageStore:
    """Implements ``ImageStore``, and what the builder needs beside it. Its root belongs to one daemon at a time."""

    def __init__(
        self,
        root: Path,
        *,
        limits: Limits = Limits(),  # noqa: B008
        fresh_s: float = FRESH_S,
        converter_id: int = NOBODY,
    ) -> None:
        """``converter_id`` is the user id that what reads disk images runs as."""
        self._shelf = Shelf(root)
        self._flights = Flights(fresh_s)
        self._limits = limits
        self._converter_id = converter_id
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._collecting = asyncio.Lock()
        self._unpackers = asyncio.Semaphore(os.cpu_count() or 1)

    async def open(self) -> None:
        """Make the directories, and remove what a killed predecessor had under way."""
        self._shelf.make()
        await self._sweep()

    async def pull(self, reference: str, *, tls_verify: bool, progress: Progress) -> ImageContent:
        name = normalise(reference)
        async with self._flight() as flight:
            progress(f"fetching {name}")
            await self._offer_blobs(flight)
            try:
                layout = await fetch(f"docker://{_without_tag(name)}", flight.directory, tls_verify=tls_verify)
            except AlveoleError as error:
                raise registry_error(name, name.partition("/")[0], error) from error
            return await self._take_image(flight, layout, name, progress)

    async def load(self, path: Path, format: Format, progress: Progress) -> ImageContent:  # noqa: A002
        if not path.exists():
            raise not_found(f"{path} does not exist on this host")
        if not (path.is_file() or (format == "oci-layout" and path.is_dir())):
            raise invalid(f"{path} is not a file, as {format} needs")
        async with self._flight() as flight:
            progress(f"reading {path}")
            if format == "rootfs":
                return await self._take_rootfs(flight, path)
            if format in {"qcow2", "raw"}:
                return await self._take_disk(flight, path, format, progress)
            source = await self._source(flight, path, format)
            await self._offer_blobs(flight)
            try:
                layout = await fetch(source, flight.directory)
            except AlveoleError as error:
                raise archive_error(path, error) from error
            return await self._take_image(flight, layout, str(path), progress)

    async def has(self, content: ImageContent) -> bool:
        if content.disk is not None:
            return self._shelf.has(disk_key(content.digest))
        return all(map(self.has_layer, content.layers))

    def has_layer(self, diff_id: str) -> bool:
        return self._shelf.has(layer_key(diff_id))

    def layer_directories(self, content: ImageContent) -> tuple[Path, ...]:
        return tuple(map(self.layer_directory, content.layers))

    def layer_directory(self, diff_id: str) -> Path:
        return self._shelf.path(layer_key(diff_id)) / "fs"

    def disk_path(self, content: ImageContent) -> Path:
        return self._shelf.path(disk_key(content.digest))

    def blob_path(self, digest: str) -> Path:
        return self._shelf.path(blob_key(digest))

    async def add_layer_tar(self, tar_path: Path, progress: Progress) -> str:
        """Store and unpack a layer's plain tar (ids as in the image, ``.wh.`` whiteouts). Returns its diff id."""
        async with self._flight() as flight:
            progress(f"adding a layer of {tar_path.stat().st_size} bytes")
            return (await self._import_layer(flight, tar_path)).diff_id

    async def add_image(self, layers: Sequence[str], config: ImageConfig) -> ImageContent:
        """Describe layers that are here (diff ids, lowest first) as an image. Raises NOT_FOUND naming a missing one."""
        async with self._flight() as flight:
            return await self._describe(flight, tuple(layers), config)

    @asynccontextmanager
    async def building(self) -> AsyncIterator[Callable[[str], None]]:
        """While inside, no layer that is added, or that the function is called with, is collected."""
        async with self._flight() as flight:

            def hold(diff_id: str) -> None:
                self._hold_layer(flight, diff_id)

            yield hold

    async def collect(self, used: Collection[ImageContent]) -> int:
        async with self._collecting:
            await self._sweep()
            unneeded = await in_thread(partial(self._unneeded, used))
            async with self._flight() as flight:
                freed = set(filter(self._shelf.has, unneeded.keys() - self._flights.held()))
                for number, key in enumerate(freed):
                    self._shelf.path(key).rename(flight.directory / str(number))
                return sum(unneeded[key] for key in freed)

    def _unneeded(self, used: Collection[ImageContent]) -> dict[str, int]:
        """Keys of what is in no image of ``used``, and their sizes in bytes."""
        needed = set[str]().union(*map(self._shelf.needed_by, used))
        return {key: self._shelf.size_bytes(key) for key in set(self._shelf.keys()) - needed}

    async def _sweep(self) -> None:
        stale = set(self._shelf.temporary.iterdir()) - self._flights.directories()
        await _remove(stale)

    @asynccontextmanager
    async def _flight(self) -> AsyncIterator[Flight]:
        """One operation. What it created is undone, and its temporary directory removed, unless it ends well."""
        flight = self._flights.begin(Path(mkdtemp(dir=self._shelf.temporary)))
        try:
            yield flight
            await _remove({flight.directory})  # the last that can be cancelled, and then all is undone
            self._flights.land(flight)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise _no_space(self._shelf.root) from error
            raise internal(f"image store {self._shelf.root}: {error}") from error
        except AlveoleError as error:
            if _NO_SPACE in error.message.lower():
                raise _no_space(self._shelf.root) from error
            raise
        finally:
            for number, key in enumerate(filter(self._shelf.has, flight.created)):
                flight.directory.mkdir(exist_ok=True)
                self._shelf.path(key).rename(flight.directory / f"undone-{number}")
            self._flights.end(flight)
            if flight.directory.exists():
                await _remove({flight.directory})

    def _lock(self, key: str) -> asyncio.Lock:
        """Held while ``key`` is looked for and brought in. It lives as long as somebody holds or awaits it."""
        return self._locks.setdefault(key, asyncio.Lock())

    async def _offer_blobs(self, flight: Flight) -> None:
        """Links to all blobs, so that those are not fetched again, and none enters the store unverified."""
        target = flight.directory / "blobs"
        await process.run(["cp", "-rl", "--", str(self._shelf.path("blobs")), str(target)], timeout_s=COPY_TIMEOUT_S)

    async def _source(self, flight: Flight, path: Path, format: Format) -> str:  # noqa: A002
        """skopeo's spelling of a local image, by a link: a colon in ``path`` would mean something to it."""
        link = flight.directory / "source"
        if format == "docker-archive":
            link.symlink_to(path.absolute())
            return f"docker-archive:{link}"
        if path.is_dir():
            link.symlink_to(path.absolute())
        else:
            prepared, _ = await self._unpack(flight, path, str(path))
            link.symlink_to(prepared / "fs")
        _check_layout(link, path)
        return f"oci:{link}"

    async def _take_image(self, flight: Flight, layout: Path, name: str, progress: Progress) -> ImageContent:
        """Verify and take in the image that ``layout`` describes, whose blobs lie in the flight's directory."""
        index = parse_index((layout / "index.json").read_bytes())
        digest = index.manifests[0].digest
        manifest = parse_manifest(_document(flight, digest))
        configuration = parse_configuration(_document(flight, manifest.config.digest))
        _check_image(name, manifest, configuration)
        for number, (blob, diff_id) in enumerate(zip(manifest.layers, configuration.diff_ids, strict=True), start=1):
            progress(f"layer {number}/{len(manifest.layers)}: {blob.size / 1e6:.1f} MB")
            await self._take_layer(flight, blob, diff_id, f"layer {number} of {name}")
        for document in (manifest.config.digest, digest):
            await self._take_blob(flight, document)
        return ImageContent(
            digest=digest,
            layers=configuration.diff_ids,
            size_bytes=sum(blob.size for blob in manifest.blobs),
            config=configuration.config,
        )

    async def _take_layer(self, flight: Flight, blob: Descriptor, diff_id: str, what: str) -> None:
        file, key = flight.directory / blob_key(blob.digest), layer_key(diff_id)
        async with self._lock(key):
            if self._shelf.has(key):
                self._hold_layer(flight, diff_id)
                if not self._shelf.has(blob_key(blob.digest)):
                    await _verify(file, blob.digest, what)
                await self._take_blob(flight, blob.digest)
                return
            try:
                prepared, report = await self._unpack(flight, file, what)
                if (report.blob_digest, report.diff_id) != (blob.digest, diff_id):
                    raise _corrupt(what)
            except AlveoleError:
                self.blob_path(blob.digest).unlink(missing_ok=True)  # it may have rotted here: fetch it next time
                raise
            await self._take_blob(flight, blob.digest)
            await self._add_layer(flight, prepared, report)

    def _hold_layer(self, flight: Flight, diff_id: str) -> LayerRecord:
        """Raises NOT_FOUND if it is not here."""
        record = self._shelf.layer(diff_id)
        self._flights.hold(flight, {layer_key(diff_id), blob_key(record.blob_digest)})
        return record

    async def _take_rootfs(self, flight: Flight, path: Path) -> ImageContent:
        report = await self._import_layer(flight, path)
        if not report.complete:
            raise invalid(f"{path} is truncated: it has no end marker")
        return await self._describe(flight, (report.diff_id,), ImageConfig())

    async def _take_disk(self, flight: Flight, path: Path, format: DiskFormat, progress: Progress) -> ImageContent:  # noqa: A002
        source = await take_copy(path, format, flight.directory, progress)
        key = disk_key(source.digest)
        async with self._lock(key):
            if self._shelf.has(key):
                self._flights.hold(flight, {key})
            else:
                async with self._unpackers:
                    raw = await make_raw(source, self._converter_id, progress)
                self._flights.create(flight, key)
                await in_thread(partial(self._shelf.add_disk, source.digest, raw))
            return ImageContent(
                digest=source.digest,
                layers=(),
                size_bytes=self._shelf.size_bytes(key),
                config=ImageConfig(),
                disk=DiskImage(format=format, virtual_size_bytes=source.virtual_bytes),
            )

    async def _import_layer(self, flight: Flight, path: Path) -> Report:
        copy = flight.directory / "import"
        await process.run(["cp", "--reflink=auto", "--", str(path), str(copy)], timeout_s=COPY_TIMEOUT_S)
        prepared, report = await self._unpack(flight, copy, str(path))
        blob = flight.directory / blob_key(report.blob_digest)
        blob.parent.mkdir(parents=True)
        copy.rename(blob)
        async with self._lock(layer_key(report.diff_id)):
            if self.has_layer(report.diff_id):
                self._hold_layer(flight, report.diff_id)
            else:
                await self._take_blob(flight, report.blob_digest)
                await self._add_layer(flight, prepared, report)
        return report

    async def _add_layer(self, flight: Flight, prepared: Path, report: Report) -> None:
        """To be called with the layer's lock held."""
        record = LayerRecord(
            blob_digest=report.blob_digest,
            blob_bytes=report.blob_bytes,
            compression=report.compression,
            unpacked_bytes=report.unpacked_bytes,
        )
        self._flights.create(flight, layer_key(report.diff_id))
        await in_thread(partial(self._shelf.add_layer, report.diff_id, prepared, record))

    async def _take_blob(self, flight: Flight, digest: str) -> None:
        """Take in a verified blob of the flight's directory."""
        key = blob_key(digest)
        async with self._lock(key):
            if self._shelf.has(key):
                self._flights.hold(flight, {key})
                return
            self._flights.create(flight, key)
            await in_thread(partial(self._shelf.add_blob, digest, flight.directory / key))

    async def _describe(self, flight: Flight, layers: tuple[str, ...], config: ImageConfig) -> ImageContent:
        records = [self._hold_layer(flight, diff_id) for diff_id in layers]
        config = config.replace(architecture=config.architecture or architecture())
        configuration = make_configuration(config, layers)
        descriptor = config_descriptor(await self._write_document(flight, configuration), len(configuration))
        manifest = make_manifest(descriptor, [record.descriptor() for record in records])
        return ImageContent(
            digest=await self._write_document(flight, manifest),
            layers=layers,
            size_bytes=len(configuration) + sum(record.blob_bytes for record in records),
            config=config,
        )

    async def _write_document(self, flight: Flight, data: bytes) -> str:
        digest = f"sha256:{sha256(data).hexdigest()}"
        file = flight.directory / blob_key(digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        await self._take_blob(flight, digest)
        return digest

    async def _unpack(self, flight: Flight, file: Path, what: str) -> tuple[Path, Report]:
        """Unpack ``file`` below a new directory's ``fs``. Raises INVALID saying what is wrong with ``what``."""
        prepared = Path(mkdtemp(dir=flight.directory))
        prepared.chmod(0o755)
        (prepared / "fs").mkdir(mode=0o755)
        arguments = [str(file), str(prepared / "fs"), str(os.getpid()), json.dumps(asdict(self._limits))]
        async with self._unpackers:
            result = await process.run(
                [sys.executable, "-I", "-m", "alveole.image.unpack", *arguments],
                timeout_s=UNPACK_TIMEOUT_S,
                check=False,
            )
        return prepared, _read_report(result, what, self._shelf.root)


def _read_report(result: process.Result, what: str, root: Path) -> Report:
    if result.code != 0:
        raise result.failure()
    report = Report(**json.loads(result.stdout))
    if report.killed_by:
        raise internal(f"unpacking {what} was ended by {report.killed_by}", hint="look for lack of memory, then retry")
    if report.no_space:
        raise _no_space(root)
    if report.error:
        raise invalid(f"{what} cannot be unpacked: {report.error}")
    return report


def _document(flight: Flight, digest: str) -> bytes:
    """A manifest or configuration that was fetched, verified."""
    file = flight.directory / blob_key(digest)
    if not file.is_file() or file.stat().st_size > DOCUMENT_LIMIT_BYTES:
        raise invalid(f"image document {digest} is missing or larger than {DOCUMENT_LIMIT_BYTES} bytes")
    data = file.read_bytes()
    if f"sha256:{sha256(data).hexdigest()}" != digest:
        raise _corrupt(f"image document {digest}")
    return data


def _check_image(name: str, manifest: Manifest, configuration: Configuration) -> None:
    if len(manifest.layers) != len(configuration.diff_ids):
        raise invalid(f"image {name} has {len(manifest.layers)} layers, but names {len(configuration.diff_ids)}")
    made_for = (configuration.os or "linux", configuration.config.architecture or architecture())
    if made_for != ("linux", architecture()):
        raise unsupported(f"image {name} is made for {'/'.join(made_for)}, this host is linux/{architecture()}")


def _check_layout(layout: Path, path: Path) -> None:
    """Only plain files: a link or a pipe would lead skopeo, which is root, elsewhere."""
    if not (layout / "index.json").is_file():
        raise invalid(f"{path} is not an OCI layout: it has no index.json", hint="give what it is with --type")
    for file in (layout / "index.json", layout / "oci-layout", *layout.glob("blobs/*"), *layout.glob("blobs/*/*")):
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            raise invalid(f"{path} is not an OCI layout: {file.relative_to(layout)} is not a plain file")


async def _verify(file: Path, digest: str, what: str) -> None:
    result = await process.run(["sha256sum", "--", str(file)], timeout_s=COPY_TIMEOUT_S)
    if f"sha256:{result.text.split()[0]}" != digest:
        raise _corrupt(what)


async def _remove(paths: Collection[Path]) -> None:
    if paths:
        await process.run(["rm", "-rf", "--one-file-system", "--", *map(str, paths)], timeout_s=COPY_TIMEOUT_S)


def _without_tag(name: str) -> str:
    """A digest says it all, and skopeo refuses both."""
    rest, at, digest = name.partition("@")
    head, slash, last = rest.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}@{digest}" if at else name


def _corrupt(what: str) -> AlveoleError:
    return invalid(f"{what} is corrupt: its digest is not what the image says", hint="fetch it again")


def _no_space(root: Path) -> AlveoleError:
    return exhausted(f"no space left for images in {root}", hint="remove images that are not used, or add space")
