"""skopeo: the program that speaks to registries and reads other image formats. What it brings is verified later."""

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alveole.host import process
from alveole.model.error import AlveoleError, ErrorCode

TIMEOUT_S = 3600.0
_AUTH_VARIABLES = ("HOME", "XDG_RUNTIME_DIR", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_CONFINED = (
    "setpriv",
    "--pdeathsig=KILL",  # it writes where open() of the next daemon cleans
    "--no-new-privs",
    "--inh-caps=-all",
    "--bounding-set=-all,+dac_read_search",  # to read archives of any user
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meaning:
    """What skopeo's words mean. ``{reference}``, ``{registry}`` and ``{words}`` are filled in."""

    pattern: str
    code: ErrorCode
    message: str
    hint: str = ""


_PLATFORM = _Meaning(
    pattern=r"no image found in (manifest list|image index)",
    code=ErrorCode.UNSUPPORTED,
    message="{reference} has no image for linux on this host's architecture",
)
_MISSING = _Meaning(
    pattern=r"failed to execute skopeo",
    code=ErrorCode.UNSUPPORTED,
    message="program skopeo is not installed",
    hint="alveole doctor names the package",
)
_REGISTRY_MEANINGS = (  # the first that matches counts
    _MISSING,
    _Meaning(
        pattern=r"[Dd]igest did not match|does not match|invalid checksum|unexpected EOF|invalid character",
        code=ErrorCode.INVALID,
        message="image {reference} is corrupt in its registry: {words}",
        hint="push it again",
    ),
    _PLATFORM,
    _Meaning(
        pattern=r"server gave HTTP response to HTTPS client",
        code=ErrorCode.UNAVAILABLE,
        message="registry {registry} speaks HTTP, not HTTPS",
        hint="allow that for this pull, if the network between is trusted",
    ),
    _Meaning(
        pattern=r"connection refused|connection reset|no such host|timeout|unreachable|TLS handshake|x509|certificate|"
        r"toomanyrequests|StatusCode: (429|5\d\d)|(429|5\d\d) \(|server misbehaving|dial tcp",
        code=ErrorCode.UNAVAILABLE,
        message="registry {registry} cannot be used: {words}",
        hint="check the name and the network, then try again",
    ),
    _Meaning(
        pattern=r"manifest unknown|name unknown|not known to registry|StatusCode: 404|404 \(",
        code=ErrorCode.NOT_FOUND,
        message="image {reference} is not in its registry",
        hint="check the name and the tag",
    ),
    _Meaning(
        pattern=r"unauthorized|authentication required|denied|invalid username/password|StatusCode: 40[13]|40[13] \(",
        code=ErrorCode.DENIED,
        message="registry {registry} does not let this host have image {reference}",
        hint="check the name, or log in as root on the host: skopeo login {registry}",
    ),
    _Meaning(pattern="", code=ErrorCode.INTERNAL, message="image {reference} cannot be pulled: {words}"),
)
_ARCHIVE_MEANINGS = (
    _MISSING,
    _PLATFORM,
    _Meaning(
        pattern=r"more than one image",
        code=ErrorCode.INVALID,
        message="{reference} holds more than one image",
        hint="save one image to a file of its own",
    ),
    _Meaning(
        pattern="",
        code=ErrorCode.INVALID,
        message="{reference} cannot be read as an image: {words}",
        hint="give the format it really has",
    ),
)


def architecture() -> str:
    """This host's, as images spell it."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


async def fetch(source: str, directory: Path, *, tls_verify: bool = True) -> Path:
    """Copy the image ``source`` (skopeo's spelling) into ``directory``; return the OCI layout that describes it.

    Blobs go to ``directory/blobs``, where those that lie there already are not fetched again.
    Raises AlveoleError(INTERNAL) with skopeo's own words: callers say what they mean.
    """
    layout, scratch = directory / "layout", directory / "scratch"
    scratch.mkdir()
    env = {name: os.environ[name] for name in _AUTH_VARIABLES if name in os.environ}
    await process.run(
        [
            *_CONFINED,
            "skopeo",
            f"--tmpdir={scratch}",
            "--override-os=linux",
            f"--override-arch={architecture()}",
            "copy",
            "--quiet",
            f"--src-tls-verify={str(tls_verify).lower()}",
            f"--dest-shared-blob-dir={directory / 'blobs'}",
            "--dest-oci-accept-uncompressed-layers",
            source,
            f"oci:{layout}:latest",
        ],
        timeout_s=TIMEOUT_S,
        env=env,
    )
    return layout


def registry_error(reference: str, registry: str, error: AlveoleError) -> AlveoleError:
    """What a failure to pull ``reference`` means."""
    if error.code == ErrorCode.TIMEOUT:
        message = f"registry {registry} did not deliver {reference} within {TIMEOUT_S:g} s"
        return AlveoleError(ErrorCode.UNAVAILABLE, message, hint="try again")
    return _meaning(_REGISTRY_MEANINGS, error, reference=reference, registry=registry)


def archive_error(path: Path, error: AlveoleError) -> AlveoleError:
    """What a failure to read the layout or archive ``path`` means."""
    return _meaning(_ARCHIVE_MEANINGS, error, reference=str(path))


def _meaning(meanings: Sequence[_Meaning], error: AlveoleError, **names: str) -> AlveoleError:
    """Only what skopeo said has to be interpreted: that it is missing or was too slow is clear."""
    if error.code != ErrorCode.INTERNAL:
        return error
    words = _reason(error.message)
    found = next(meaning for meaning in meanings if re.search(meaning.pattern, words))
    names |= {"words": words}
    return AlveoleError(found.code, found.message.format(**names), hint=found.hint.format(**names) or error.hint)


def _reason(message: str) -> str:
    """The message of skopeo's log line (``time=... level=fatal msg="..."``), else all it said."""
    match = re.search(r'level=fatal msg="((?:[^"\\]|\\.)*)"', message)
    return match[1].replace('\\"', '"') if match else message
