"""What skopeo says becomes an error a user can act on."""

from pathlib import Path

import pytest

from alveole.image.fetch import archive_error, registry_error
from alveole.model.error import AlveoleError, ErrorCode, internal


def said(words: str) -> AlveoleError:
    return internal(f'setpriv failed: time="2026-01-01T00:00:00Z" level=fatal msg="{words}"', hint="to replay: ...")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("reading manifest x in r.io/app: manifest unknown: manifest unknown", ErrorCode.NOT_FOUND),
        (
            "reading manifest latest in r.io/app: name unknown: repository name not known to registry",
            ErrorCode.NOT_FOUND,
        ),
        ("reading manifest latest in r.io/app: unauthorized: authentication required", ErrorCode.DENIED),
        ("requested access to the resource is denied", ErrorCode.DENIED),
        ("pinging registry r.io: StatusCode: 403, Forbidden", ErrorCode.DENIED),
        ("dial tcp 127.0.0.1:1: connect: connection refused", ErrorCode.UNAVAILABLE),
        ("dial tcp: lookup r.io on 10.0.0.1:53: no such host", ErrorCode.UNAVAILABLE),
        ("net/http: TLS handshake timeout", ErrorCode.UNAVAILABLE),
        ("x509: certificate signed by unknown authority", ErrorCode.UNAVAILABLE),
        ("http: server gave HTTP response to HTTPS client", ErrorCode.UNAVAILABLE),
        ("toomanyrequests: You have reached your pull rate limit", ErrorCode.UNAVAILABLE),
        ("received unexpected HTTP status: 503 (Service Unavailable)", ErrorCode.UNAVAILABLE),
        ("Digest did not match, expected sha256:a, got sha256:b", ErrorCode.INVALID),
        ('no image found in manifest list for architecture amd64, variant \\"\\", OS linux', ErrorCode.UNSUPPORTED),
        ("something new", ErrorCode.INTERNAL),
    ],
)
def test_registry_errors(words: str, code: ErrorCode) -> None:
    error = registry_error("r.io/app:latest", "r.io", said(words))
    assert error.code == code
    assert "r.io" in error.message
    assert error.hint
    assert "level=fatal" not in error.message


def test_too_slow_is_the_registry_s_fault() -> None:
    error = registry_error("r.io/app:latest", "r.io", AlveoleError(ErrorCode.TIMEOUT, "setpriv did not end"))
    assert error.code == ErrorCode.UNAVAILABLE


def test_what_is_not_skopeo_s_stays() -> None:
    missing = AlveoleError(ErrorCode.UNSUPPORTED, "program setpriv is not installed")
    assert registry_error("r.io/app:latest", "r.io", missing) is missing
    assert archive_error(Path("/x"), missing) is missing


def test_missing_program() -> None:
    error = registry_error(
        "r.io/app", "r.io", internal("setpriv failed: setpriv: failed to execute skopeo: No such file")
    )
    assert error.code == ErrorCode.UNSUPPORTED
    assert "skopeo is not installed" in error.message


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("more than one image in oci, choose an image", ErrorCode.INVALID),
        ("archive/tar: invalid tar header", ErrorCode.INVALID),
        ("no image found in image index for architecture amd64", ErrorCode.UNSUPPORTED),
    ],
)
def test_archive_errors(words: str, code: ErrorCode) -> None:
    error = archive_error(Path("/some/file.tar"), said(words))
    assert error.code == code
    assert "/some/file.tar" in error.message
    assert error.hint
