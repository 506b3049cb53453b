"""A real docker-registry on a free loopback port, for tests that pull."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}}}
http: {{addr: "127.0.0.1:{port}", secret: test{auth}}}
"""


class Registry:
    """``address`` is what references begin with; ``storage`` may be damaged by tests."""

    def __init__(self, directory: Path, port: int, *, password: bool = False) -> None:
        self.address = f"127.0.0.1:{port}"
        self.storage = directory / "storage"
        config = directory / "config.yml"
        auth = f"}}\nauth: {{htpasswd: {{realm: test, path: {directory / 'htpasswd'}}}" if password else ""
        config.write_text(_CONFIG.format(storage=self.storage, port=port, auth=auth))
        self._process = subprocess.Popen(
            ["docker-registry", "serve", config],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"},
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://{self.address}/v2/", timeout=5).close()
            except urllib.error.HTTPError as error:  # it answers: log in first
                error.close()
            except OSError:
                time.sleep(0.05)
                continue
            return
        self.stop()
        raise TimeoutError(f"docker-registry does not answer on {self.address}")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=20)

    def push(self, layout: Path, name: str) -> str:
        """Push an OCI layout; return its reference in this registry."""
        reference = f"{self.address}/{name}"
        subprocess.run(
            ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:latest", f"docker://{reference}"],
            check=True,
            capture_output=True,
            timeout=60,
        )
        return reference

    def blob(self, digest: str) -> Path:
        digits = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / digits[:2] / digits / "data"


@contextmanager
def running_registry(directory: Path, *, password: bool = False) -> Iterator[Registry]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    registry = Registry(directory, port, password=password)
    try:
        registry.wait()
        yield registry
    finally:
        registry.stop()
