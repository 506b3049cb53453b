"""Loading files, the builder's side of the store, and a daemon killed in the middle."""

import asyncio
import gzip
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from backports import zstd

from alveole.image.base import Format
from alveole.image.fetch import architecture
from alveole.image.store import LocalImageStore
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.image import ImageConfig, ImageContent
from tests.oci import busybox_files, digest_of, make_layout, make_tar, symlink

pytestmark = pytest.mark.root


@pytest.fixture
async def store(tmp_path: Path) -> LocalImageStore:
    store = LocalImageStore(tmp_path / "store", fresh_s=0)
    await store.open()
    return store


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An image of two layers, in a directory whose name means something to skopeo."""
    layout = tmp_path / "my:layout"
    layout.mkdir()
    make_layout(layout, [busybox_files(), make_tar({"hello": b"hi"})], {"Cmd": ["/bin/sh"]})
    return layout


def ignore(line: str) -> None:
    assert line


def stored(store: LocalImageStore) -> set[str]:
    root = store.blob_path("x").parents[2]
    return {
        str(path.relative_to(root)) for name in ("blobs/sha256", "layers", "tmp") for path in (root / name).iterdir()
    }


def archive_of(layout: Path, kind: str) -> Path:
    """The layout as a file: its tar, or what ``docker save`` writes."""
    path = layout.with_name(f"archive:{kind}")
    link = layout.with_name("link")
    link.symlink_to(layout)
    argv = {
        "tar": ["tar", "-cf", str(path), "--force-local", "-C", str(layout), "."],
        "tar.gz": ["tar", "-czf", str(path), "--force-local", "-C", str(layout), "."],
        "docker": ["skopeo", "copy", "-q", f"oci:{link}:latest", f"docker-archive:{layout.with_name('saved')}:a:1"],
    }[kind]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    return layout.with_name("saved") if kind == "docker" else path


@pytest.mark.parametrize(
    ("kind", "format_"),
    [("directory", "oci-layout"), ("tar", "oci-layout"), ("tar.gz", "oci-layout"), ("docker", "docker-archive")],
)
async def test_load(kind: str, format_: Format, store: LocalImageStore, layout: Path) -> None:
    """The same image, whatever it comes in; loading again changes nothing."""
    path = layout if kind == "directory" else archive_of(layout, kind)
    content = await store.load(path, format_, ignore)
    base, upper = store.layer_directories(content)
    assert (base / "bin/sh").resolve().read_bytes() == Path("/usr/bin/busybox").read_bytes()
    assert (upper / "hello").read_bytes() == b"hi"
    assert content.config.command == ("/bin/sh",)
    before = stored(store)
    assert await store.load(path, format_, ignore) == content
    assert stored(store) == before


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd.compress])
async def test_load_rootfs(compress: object, store: LocalImageStore, tmp_path: Path) -> None:
    """One layer, whose diff id is that of the plain tar however it came."""
    assert callable(compress)
    data = make_tar(busybox_files())
    path = tmp_path / "rootfs"
    written = compress(data)
    path.write_bytes(written)
    content = await store.load(path, "rootfs", ignore)
    assert content.layers == (digest_of(data),)
    assert content.config == ImageConfig(architecture=architecture())
    assert (store.layer_directories(content)[0] / "etc/passwd").exists()
    assert path.read_bytes() == written


async def test_load_what_is_no_image(store: LocalImageStore, layout: Path, tmp_path: Path) -> None:
    """Each refusal names the path, and leaves nothing."""
    missing = tmp_path / "missing"
    with pytest.raises(AlveoleError, match=str(missing)) as error:
        await store.load(missing, "oci-layout", ignore)
    assert error.value.code == ErrorCode.NOT_FOUND
    text = tmp_path / "text"
    text.write_bytes(b"this is no archive\n" * 100)
    empty = tmp_path / "empty"
    empty.mkdir()
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("oci-layout", "index.json"):
        (linked / name).write_bytes((layout / name).read_bytes())
    (linked / "blobs").symlink_to("/etc")
    cases: list[tuple[Path, Format]] = [
        (text, "oci-layout"),
        (text, "docker-archive"),
        (empty, "oci-layout"),
        (empty, "docker-archive"),
        (empty, "rootfs"),
        (linked, "oci-layout"),
    ]
    for path, format_ in cases:
        with pytest.raises(AlveoleError, match=str(path)) as error:
            await store.load(path, format_, ignore)
        assert error.value.code == ErrorCode.INVALID, (path, format_)
    assert stored(store) == set()


async def test_a_layout_that_lies(store: LocalImageStore, layout: Path) -> None:
    """A tar whose blob is a link out of it is refused before anything follows the link."""
    blob = next((layout / "blobs/sha256").iterdir())
    blob.unlink()
    blob.symlink_to("/etc/shadow")
    with pytest.raises(AlveoleError, match="is not a plain file"):
        await store.load(archive_of(layout, "tar"), "oci-layout", ignore)
    assert stored(store) == set()


async def test_image_for_another_machine(store: LocalImageStore, layout: Path) -> None:
    other = layout.with_name("other")
    other.mkdir()
    make_layout(other, [{"a": b"1"}], {}, architecture="s390x")
    with pytest.raises(AlveoleError, match="made for linux/s390x") as error:
        await store.load(other, "oci-layout", ignore)
    assert error.value.code == ErrorCode.UNSUPPORTED


async def test_builder_adds_layers_and_an_image(store: LocalImageStore, layout: Path, tmp_path: Path) -> None:
    """The image is as good as a pulled one: written as a layout again, it loads into another store."""
    base = await store.load(layout, "oci-layout", ignore)
    tar = tmp_path / "layer.tar"
    tar.write_bytes(make_tar({"new": b"x", "bin/.wh.nc": b"", "link": symlink("link", "new")}))
    diff_id = await store.add_layer_tar(tar, ignore)
    assert diff_id == digest_of(tar.read_bytes())
    assert await store.add_layer_tar(tar, ignore) == diff_id
    assert store.blob_path(diff_id).read_bytes() == tar.read_bytes()
    assert (store.layer_directory(diff_id) / "new").read_bytes() == b"x"

    config = ImageConfig(command=("/bin/sh",), env=("A=b",), labels={"k": "v"})
    content = await store.add_image((*base.layers, diff_id), config)
    assert content == await store.add_image((*base.layers, diff_id), config)
    assert content.config == config.replace(architecture=architecture())
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "blobs").symlink_to(store.blob_path("x").parents[1])
    (exported / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (exported / "index.json").write_text(
        '{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",'
        f'"digest":"{content.digest}","size":{store.blob_path(content.digest).stat().st_size}}}]}}'
    )
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-rL", exported, copy], check=True)
    other = LocalImageStore(tmp_path / "other")
    await other.open()
    assert await other.load(copy, "oci-layout", ignore) == content


async def test_image_of_missing_layer(store: LocalImageStore) -> None:
    missing = "sha256:" + "1" * 64
    with pytest.raises(AlveoleError, match=missing) as error:
        await store.add_image([missing], ImageConfig())
    assert error.value.code == ErrorCode.NOT_FOUND
    assert stored(store) == set()


async def test_a_build_under_way_keeps_its_layers(store: LocalImageStore, tmp_path: Path) -> None:
    """Those it adds, and those of earlier builds that it finds again."""
    old, new = tmp_path / "old.tar", tmp_path / "new.tar"
    old.write_bytes(make_tar({"old": b"x"}))
    new.write_bytes(make_tar({"new": b"x"}))
    cached = await store.add_layer_tar(old, ignore)
    async with store.building() as hold:
        hold(cached)
        added = await store.add_layer_tar(new, ignore)
        assert await store.collect([]) == 0
        content = await store.add_image([cached, added], ImageConfig())
    assert await store.collect([content]) == 0
    assert await store.has(content)
    assert await store.collect([]) > 0
    assert stored(store) == set()


async def test_collect_while_pulls_come_and_go(store: LocalImageStore, layout: Path) -> None:
    """Whatever the moment, a load that ends well leaves all its layers, if its image counts as used."""
    loading = True
    content = await store.load(layout, "oci-layout", ignore)

    async def collect_always() -> None:
        while loading:
            await store.collect([content])

    collector = asyncio.create_task(collect_always())
    for i in range(3):
        other = layout.with_name(f"other{i}")
        other.mkdir()
        make_layout(other, [busybox_files(), {"n": str(i).encode()}], {})
        await store.load(other, "oci-layout", ignore)
        assert await store.has(content)
    loading = False
    await collector
    await store.collect([content])
    assert len([key for key in stored(store) if key.startswith("layers/")]) == 2


async def test_no_space(tmp_path: Path, layout: Path) -> None:
    """A full disk is said to be one, and what was written is removed."""
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", root], check=True)
    try:
        store = LocalImageStore(root / "store")
        await store.open()
        big = layout.with_name("big")
        big.mkdir()
        make_layout(big, [{"zeros": bytes(8 << 20)}], {})
        with pytest.raises(AlveoleError, match="no space left") as error:
            await store.load(big, "oci-layout", ignore)
        assert error.value.code == ErrorCode.EXHAUSTED
        assert stored(store) == set()
        rootfs = tmp_path / "rootfs.tar"
        rootfs.write_bytes(make_tar({"a": os.urandom(8 << 20)}))
        with pytest.raises(AlveoleError, match="no space left") as error:
            await store.load(rootfs, "rootfs", ignore)
        assert error.value.code == ErrorCode.EXHAUSTED
        assert stored(store) == set()
    finally:
        subprocess.run(["umount", root], check=True)


_LOADER = """
import asyncio, sys
from pathlib import Path
from alveole.image.store import LocalImageStore

async def main():
    store = LocalImageStore(Path(sys.argv[1]))
    await store.open()
    await store.load(Path(sys.argv[2]), "oci-layout", lambda line: print(line, flush=True))

asyncio.run(main())
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.15])
@pytest.mark.parametrize("line", ["reading", "layer 1", "layer 2"])
async def test_killed_daemon(line: str, delay_s: float, layout: Path, tmp_path: Path) -> None:
    """kill -9 at any step: its programs die with it, the next open removes what was half made, and loading works."""
    big = layout.with_name("big")
    big.mkdir()
    make_layout(big, [make_tar({f"f{i}": os.urandom(1 << 20) for i in range(24)}), busybox_files()], {})
    root = tmp_path / "store"
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", _LOADER, root, big, stdout=subprocess.PIPE)
    assert daemon.stdout
    while not (said := await daemon.stdout.readline()).decode().startswith(line):
        assert said, "it ended by itself"
    await asyncio.sleep(delay_s)
    with suppress(ProcessLookupError):  # a fast machine is through with the last layer by then
        daemon.send_signal(signal.SIGKILL)
    await daemon.wait()
    await _no_process_in(root)
    store = LocalImageStore(root, fresh_s=0)
    await store.open()
    assert not [key for key in stored(store) if key.startswith("tmp/")]
    content: ImageContent = await store.load(big, "oci-layout", ignore)
    assert len(list(store.layer_directories(content)[0].iterdir())) == 24
    await store.collect([])
    assert stored(store) == set()


async def _no_process_in(root: Path) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        found = subprocess.run(["pgrep", "-f", "--", str(root)], capture_output=True, text=True, check=False).stdout
        if not found:
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"still at work: {found}")
