"""Pulling from a real docker-registry on loopback: sharing, corruption, errors, concurrency, cancel, collection."""

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from backports import zstd

from alveole.image import store as image_store
from alveole.image.store import LocalImageStore
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.image import ImageContent
from tests.oci import Layer, busybox_files, make_layout, make_tar
from tests.registry import Registry, running_registry

pytestmark = pytest.mark.root

CONFIG = {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    directory = tmp_path / "registry"
    directory.mkdir()
    with running_registry(directory) as registry:
        yield registry


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalImageStore]:
    """Nothing half done, and no program at work, may be left when a test ends."""
    store = LocalImageStore(tmp_path / "store", fresh_s=0)
    await store.open()
    yield store
    assert not list((tmp_path / "store/tmp").iterdir())
    assert processes_in(tmp_path / "store") == []


class Progress(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def processes_in(directory: Path) -> list[bytes]:
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            commands.append(path.read_bytes())
    return [command for command in commands if os.fsencode(directory) in command]


def push(registry: Registry, tmp_path: Path, name: str, *layers: Layer) -> str:
    layout = tmp_path / name.replace(":", "-")
    layout.mkdir()
    make_layout(layout, layers, CONFIG)
    return registry.push(layout, name)


async def pull(store: LocalImageStore, reference: str) -> ImageContent:
    return await store.pull(reference, tls_verify=False, progress=Progress())


def stored(tmp_path: Path) -> set[str]:
    """All objects of the store, and anything half done."""
    root = tmp_path / "store"
    return {
        str(path.relative_to(root)) for name in ("blobs/sha256", "layers", "tmp") for path in (root / name).iterdir()
    }


async def test_pull_twice(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    """The second time nothing is fetched (the registry has lost the layer) nor unpacked (same inode)."""
    reference = push(registry, tmp_path, "busybox:1", busybox_files(), zstd.compress(make_tar({"hello": b"hi"})))
    progress = Progress()
    content = await store.pull(reference, tls_verify=False, progress=progress)
    assert progress[0] == f"fetching {reference}"
    assert progress[-1].startswith("layer 2/2: ")
    assert content.config.command == ("/bin/sh",)
    base, upper = store.layer_directories(content)
    assert (base / "bin/busybox").read_bytes() == Path("/usr/bin/busybox").read_bytes()
    assert (upper / "hello").read_bytes() == b"hi"
    assert await store.has(content)

    manifest = json.loads(store.blob_path(content.digest).read_bytes())
    registry.blob(manifest["layers"][0]["digest"]).unlink()
    inode = base.stat().st_ino
    assert await pull(store, reference) == content
    assert base.stat().st_ino == inode
    assert content.size_bytes == manifest["config"]["size"] + sum(layer["size"] for layer in manifest["layers"])


async def test_by_digest(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    """A digest counts, and the tag beside it is not asked for."""
    reference = push(registry, tmp_path, "app:1", {"a": b"1"})
    content = await pull(store, reference)
    assert await pull(store, f"{registry.address}/app@{content.digest}") == content
    assert await pull(store, f"{registry.address}/app:other@{content.digest}") == content


async def test_layers_are_shared_and_collected(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    one = await pull(store, push(registry, tmp_path, "one", busybox_files(), {"a": b"1"}))
    two = await pull(store, push(registry, tmp_path, "two", busybox_files(), {"b": b"2"}))
    assert one.layers[0] == two.layers[0]
    assert len(list((tmp_path / "store/layers").iterdir())) == 3
    everything = stored(tmp_path)

    assert await store.collect([one, two]) == 0
    assert stored(tmp_path) == everything
    assert 0 < await store.collect([two]) < 1 << 20  # the base stays
    assert await store.has(two)
    assert not await store.has(one)
    assert await store.collect([]) > Path("/usr/bin/busybox").stat().st_size
    assert stored(tmp_path) == set()


async def test_what_was_just_pulled_is_not_collected(registry: Registry, tmp_path: Path) -> None:
    """The record that names it may not be written yet."""
    store = LocalImageStore(tmp_path / "store", fresh_s=60)
    await store.open()
    content = await pull(store, push(registry, tmp_path, "one", {"a": b"1"}))
    assert await store.collect([]) == 0
    assert await store.has(content)


async def test_concurrent_pulls_unpack_a_layer_once(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    """Seen from the unpacker's runs: three layers in all, though ten are asked for."""
    references = [push(registry, tmp_path, f"app{i}", busybox_files(), {"n": str(i % 2).encode()}) for i in range(5)]
    unpacked = []
    original = store._unpack

    async def counted(*arguments: object) -> object:
        unpacked.append(arguments[-1])
        return await original(*arguments)  # type: ignore[arg-type]

    store._unpack = counted  # type: ignore[method-assign,assignment]
    contents = await asyncio.gather(*(pull(store, reference) for reference in references))
    assert len(unpacked) == len({layer for content in contents for layer in content.layers}) == 3
    assert all([await store.has(content) for content in contents])
    assert not list((tmp_path / "store/tmp").iterdir())


async def test_a_failing_pull_keeps_what_another_relies_on(
    registry: Registry, store: LocalImageStore, tmp_path: Path
) -> None:
    """One image's second layer is broken; a concurrent pull uses its first."""
    good = push(registry, tmp_path, "good", busybox_files())
    bad = push(registry, tmp_path, "bad", busybox_files(), b"no tar" * 1000)
    results = await asyncio.gather(pull(store, bad), pull(store, good), return_exceptions=True)
    assert isinstance(results[0], AlveoleError)
    assert isinstance(results[1], ImageContent)
    assert await store.has(results[1])
    assert store.blob_path(results[1].digest).exists()


@pytest.mark.parametrize("damage", ["layer", "config"])
async def test_corrupt_in_the_registry(damage: str, registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    reference = push(registry, tmp_path, "app", {"a": os.urandom(1000)})
    index = json.loads((tmp_path / "app/index.json").read_text())
    manifest = json.loads(registry.blob(index["manifests"][0]["digest"]).read_bytes())
    descriptor = manifest["config"] if damage == "config" else manifest["layers"][0]
    blob = registry.blob(descriptor["digest"])
    blob.write_bytes(blob.read_bytes()[:-3] + b"xyz")
    with pytest.raises(AlveoleError, match="corrupt") as failure:
        await pull(store, reference)
    assert failure.value.code == ErrorCode.INVALID
    assert stored(tmp_path) == set()


async def test_claimed_diff_id_is_verified(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    """An image that passes its own layer off as another's poisons nothing."""
    layout = tmp_path / "liar"
    layout.mkdir()
    make_layout(layout, [{"evil": b"x"}], {}, diff_ids=["sha256:" + "0" * 64])
    with pytest.raises(AlveoleError, match=r"layer 1 of .* is corrupt"):
        await pull(store, registry.push(layout, "liar"))
    assert stored(tmp_path) == set()


async def test_rotten_blob_is_fetched_again(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    """A blob damaged on our disk fails one pull by name; the next one brings it anew."""
    reference = push(registry, tmp_path, "app", {"a": b"1"})
    content = await pull(store, reference)
    manifest = json.loads(store.blob_path(content.digest).read_bytes())
    blob = store.blob_path(manifest["layers"][0]["digest"])
    blob.write_bytes(b"rotten")
    store.layer_directory(content.layers[0]).parent.rename(tmp_path / "lost")
    with pytest.raises(AlveoleError, match=r"cannot be unpacked|corrupt"):
        await pull(store, reference)
    assert await pull(store, reference) == content
    assert await store.has(content)


async def test_missing_image(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    push(registry, tmp_path, "app:1", {"a": b"1"})
    for name in ("app:2", "nothing"):
        with pytest.raises(AlveoleError, match=f"{name}.* is not in its registry") as failure:
            await pull(store, f"{registry.address}/{name}")
        assert failure.value.code == ErrorCode.NOT_FOUND
    assert stored(tmp_path) == set()


async def test_registry_stopped(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    reference = push(registry, tmp_path, "app:1", {"a": b"1"})
    registry.stop()
    with pytest.raises(AlveoleError, match=f"registry {registry.address} cannot be used.*refused") as failure:
        await pull(store, reference)
    assert failure.value.code == ErrorCode.UNAVAILABLE
    with pytest.raises(AlveoleError, match=r"registry nothing\.invalid cannot be used") as failure:
        await pull(store, "nothing.invalid/app")
    assert failure.value.code == ErrorCode.UNAVAILABLE
    assert stored(tmp_path) == set()


async def test_registry_without_tls(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    """Verification is on unless the user says otherwise."""
    reference = push(registry, tmp_path, "app:1", {"a": b"1"})
    with pytest.raises(AlveoleError, match="speaks HTTP, not HTTPS") as failure:
        await store.pull(reference, tls_verify=True, progress=Progress())
    assert failure.value.code == ErrorCode.UNAVAILABLE


async def test_registry_that_wants_a_login(
    store: LocalImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused without credentials; with those of the host's usual file the image is simply not there."""
    directory = tmp_path / "locked"
    directory.mkdir()
    (directory / "htpasswd").write_text("me:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n")
    auth_file = tmp_path / "auth.json"
    with running_registry(directory, password=True) as registry:
        with pytest.raises(AlveoleError, match="does not let this host have") as failure:
            await pull(store, f"{registry.address}/app")
        assert failure.value.code == ErrorCode.DENIED
        credentials = base64.b64encode(b"me:secret").decode()
        auth_file.write_text(json.dumps({"auths": {registry.address: {"auth": credentials}}}))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(auth_file))
        with pytest.raises(AlveoleError) as failure:
            await pull(store, f"{registry.address}/app")
        assert failure.value.code == ErrorCode.NOT_FOUND
    assert stored(tmp_path) == set()


async def test_a_pull_cancelled_at_its_very_end_leaves_nothing(
    registry: Registry, store: LocalImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all is there and only its temporary files are still to be removed."""
    reference = push(registry, tmp_path, "app", busybox_files())
    removing, remove = asyncio.Event(), image_store._remove

    async def slow_remove(paths: set[Path]) -> None:
        if not removing.is_set():
            removing.set()
            await asyncio.sleep(60)
        await remove(paths)

    monkeypatch.setattr(image_store, "_remove", slow_remove)
    work = asyncio.create_task(pull(store, reference))
    await asyncio.wait_for(removing.wait(), 20)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert stored(tmp_path) == set()


async def test_cancelled_pull_leaves_nothing(registry: Registry, store: LocalImageStore, tmp_path: Path) -> None:
    """Cancelled at many moments: while fetching, while unpacking the first or second layer."""
    reference = push(registry, tmp_path, "app", busybox_files(), {"b": os.urandom(3 << 20)})
    for delay_s in (0.005, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
        work = asyncio.create_task(pull(store, reference))
        done, _ = await asyncio.wait([work], timeout=delay_s)
        if done:
            break
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert stored(tmp_path) == set()
