"""Image references as Docker's users write them: ``nginx`` means ``docker.io/library/nginx:latest``."""

import re

from alveole.model.error import AlveoleError, invalid

_DEFAULT_REGISTRY = "docker.io"
_DEFAULT_NAMESPACE = "library/"
_DEFAULT_TAG = "latest"
_NAME_LIMIT = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def normalise(reference: str) -> str:
    """The full spelling: registry, path, and a tag or digest (both if both are given).

    Normalising twice changes nothing. Raises AlveoleError(INVALID) quoting the part that is wrong.
    """
    rest, at, digest = reference.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _wrong(reference, "digest", digest, "sha256: and 64 hexadecimal digits")
    name, tag = _split_tag(rest)
    if tag is not None and not _TAG.fullmatch(tag):
        raise _wrong(reference, "tag", tag, "up to 128 letters, digits, '_', '.' and '-'")
    registry, path = _split_registry(name)
    if not _REGISTRY.fullmatch(registry):
        raise _wrong(reference, "registry", registry, "a host name, with a port if need be")
    for component in path.split("/"):
        if not _COMPONENT.fullmatch(component):
            raise _wrong(reference, "name", component, "lower-case letters and digits, single '.', '_' or '-' between")
    full = f"{registry}/{path}"
    if len(full) > _NAME_LIMIT:
        raise invalid(f"image reference {full[:60]}... is longer than {_NAME_LIMIT} characters", field="image")
    tag = tag or ("" if digest else _DEFAULT_TAG)
    return full + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")


def familiar(reference: str) -> str:
    """The shortest spelling that normalises to the same: without what Docker's users leave out, but with its tag."""
    short = normalise(reference).removeprefix(f"{_DEFAULT_REGISTRY}/")
    if short.count("/") == 1 and short.startswith(_DEFAULT_NAMESPACE):
        return short.removeprefix(_DEFAULT_NAMESPACE)
    return short


def _split_tag(name: str) -> tuple[str, str | None]:
    """A colon before the last slash belongs to the registry's port."""
    head, slash, last = name.rpartition("/")
    last, colon, tag = last.partition(":")
    return head + slash + last, tag if colon else None


def _split_registry(name: str) -> tuple[str, str]:
    """The first part is a registry if it can be no name of an image: with a dot, a colon or capitals, or localhost."""
    first, slash, rest = name.partition("/")
    if slash and (first == "localhost" or re.search(r"[.:A-Z]", first)):
        registry, path = ("docker.io" if first == "index.docker.io" else first), rest
    else:
        registry, path = _DEFAULT_REGISTRY, name
    if registry == _DEFAULT_REGISTRY and "/" not in path:
        path = _DEFAULT_NAMESPACE + path
    return registry, path


def _wrong(reference: str, what: str, part: str, rule: str) -> AlveoleError:
    shown = reference if len(reference) <= 80 else f"{reference[:80]}..."
    return invalid(f"image reference {shown!r}: {what} {part[:80]!r} is not valid", hint=f"it is {rule}", field="image")
