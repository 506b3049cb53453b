"""References mean what Docker's users expect."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.reference import familiar, normalise

DIGEST = "sha256:" + "0123456789abcdef" * 4

components = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
registries = st.from_regex(r"([a-z0-9]{1,8}\.[a-z]{2,5}|localhost|[a-z]{1,5}:[0-9]{1,5})", fullmatch=True)
tags = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@pytest.mark.parametrize(
    ("given_", "full", "short"),
    [
        ("nginx", "docker.io/library/nginx:latest", "nginx:latest"),
        ("nginx:1.25", "docker.io/library/nginx:1.25", "nginx:1.25"),
        ("me/app", "docker.io/me/app:latest", "me/app:latest"),
        ("library/nginx", "docker.io/library/nginx:latest", "nginx:latest"),
        ("docker.io/nginx", "docker.io/library/nginx:latest", "nginx:latest"),
        ("index.docker.io/me/app", "docker.io/me/app:latest", "me/app:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/a/b/c:x", "localhost:5000/a/b/c:x", "localhost:5000/a/b/c:x"),
        ("[::1]:5000/app", "[::1]:5000/app:latest", "[::1]:5000/app:latest"),
        ("Registry/app", "Registry/app:latest", "Registry/app:latest"),
        (f"nginx@{DIGEST}", f"docker.io/library/nginx@{DIGEST}", f"nginx@{DIGEST}"),
        (f"nginx:1@{DIGEST}", f"docker.io/library/nginx:1@{DIGEST}", f"nginx:1@{DIGEST}"),
    ],
)
def test_spellings(given_: str, full: str, short: str) -> None:
    assert normalise(given_) == full
    assert familiar(given_) == short


@pytest.mark.parametrize(
    ("reference", "part"),
    [
        ("", "name ''"),
        ("Nginx", "name 'Nginx'"),
        ("a//b", "name ''"),
        ("../etc", "registry '..'"),
        ("x/../etc", "name '..'"),
        ("-a", "name '-a'"),
        ("a:", "tag ''"),
        ("a:b:c", "tag 'b:c'"),
        ("a:-b", "tag '-b'"),
        ("a:" + "t" * 129, "tag 'ttt"),
        ("a@sha256:123", "digest 'sha256:123'"),
        ("a@", "digest ''"),
        ("a@md5:" + "0" * 32, "digest 'md5:"),
        ("a b", "name 'a b'"),
        ("a\n", r"name 'a\n'"),
        ("a:b\n", r"tag 'b\n'"),
        ("host:port/app", "registry 'host:port'"),
        ("docker://nginx", "registry 'docker:'"),
        ("a.b/" + "c" * 260, "longer than 255"),
    ],
)
def test_wrong_part_is_quoted(reference: str, part: str) -> None:
    with pytest.raises(AlveoleError) as error:
        normalise(reference)
    assert error.value.code == ErrorCode.INVALID
    assert part in error.value.message


@given(
    registry=st.none() | registries,
    path=st.lists(components, min_size=1, max_size=3),
    tag=st.none() | tags,
    digest=st.none() | st.just(DIGEST),
)
def test_normal_form(registry: str | None, path: list[str], tag: str | None, digest: str | None) -> None:
    """Normalising twice changes nothing, the short form means the same, and what was said is kept."""
    if registry is None and len(path) > 1 and ("." in path[0] or path[0] == "localhost"):
        return  # its first part is a registry
    reference = "/".join([*([registry] if registry else []), *path])
    reference += (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    full = normalise(reference)
    assert normalise(full) == full == normalise(familiar(full))
    assert full.startswith(f"{registry or 'docker.io'}/")
    assert (digest or "") in full
    assert (f":{tag}" if tag else "") in full
    assert full.partition("@")[0].rpartition("/")[2].startswith(path[-1])


@given(st.text(max_size=40))
def test_any_text_is_refused_or_normalised(text: str) -> None:
    full, code = "", ErrorCode.INTERNAL
    try:
        full = normalise(text)
    except AlveoleError as error:
        code = error.code
    if not full:
        assert code == ErrorCode.INVALID
        return
    assert normalise(full) == full
    assert full.isprintable()
    assert " " not in full
