"""Debian: a base layer made by mmdebstrap, and packages installed in a layer above, both from the host's own archives.

Which mirrors, keys and proxies those are is read from the host's apt configuration; none is built in.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alveole.host.process import run
from alveole.model.error import invalid, unsupported

ANY_SUITE = "@SUITE@"
"""Stands in sources for the suite that an image only known by its own /etc/os-release is made from."""

APT_INSIDE = "/run/alveole-apt"
"""Where a container that installs packages sees what ``write_apt_files`` wrote."""

SOURCE_DATE_EPOCH_S = 1_704_067_200
"""Time of all files whose real time says nothing, so that equal inputs make equal layers: 2024-01-01."""

_ENDS_WITH_US = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--pid", "--mount-proc", "--fork", "--kill-child"),
)
"""Before a program: however this daemon ends, the program ends too, with all its descendants and mounts."""

_ROLLING = frozenset({"sid", "unstable", "experimental"})  # they have neither updates nor security
_BOOTSTRAP_OPTIONS = (
    "--mode=root",
    "--variant=apt",
    "--format=tar",
    "--skip=output/dev",  # every instance gets a /dev of its own
    "--hook-dir=/usr/share/mmdebstrap/hooks/maybe-merged-usr",
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "info", "locale", "lintian")),
    "--dpkgopt=path-include=/usr/share/doc/*/copyright",
    # the first two are only needed while it is made; the others are this host's, copied in by mmdebstrap
    '--customize-hook=cd "$1/etc" && rm -f apt/apt.conf.d/99build apt/preferences.d/build hostname resolv.conf',
)
# usrmerge converts old installations, and brings 50 MB of Perl; usr-is-merged satisfies the same dependency
_PREFERENCES = "Package: usrmerge\nPin: release *\nPin-Priority: -1\n"
_KEPT_APT_OPTIONS = re.compile(r'Acquire::(https?::|Check-)[A-Za-z0-9:.-]* ".*";')

INSTALL_SCRIPT = f"""
set -eu
. /etc/os-release
if ! command -v apt-get >/dev/null; then
    echo "packages need a base with apt-get, and ${{PRETTY_NAME:-this base}} has none" >&2
    exit 1
fi
sources=
if [ "$ID" = debian ]; then
    sed "s/{ANY_SUITE}/${{VERSION_CODENAME:-}}/g" {APT_INSIDE}/sources.list >/var/cache/apt/build.list
    sources="-o Dir::Etc::SourceList=/var/cache/apt/build.list -o Dir::Etc::SourceParts=/dev/null"
fi
apt() {{
    DEBIAN_FRONTEND=noninteractive \\
    apt-get -q -c {APT_INSIDE}/apt.conf $sources -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-unsafe-io "$@"
}}
policy=/usr/sbin/policy-rc.d
if ! [ -e "$policy" ]; then  # services start with an instance, not while its image is built
    printf '#!/bin/sh\\nexit 101\\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm "$policy"' EXIT
fi
apt update
apt install -y --no-install-recommends -- "$@"
rm -rf /var/log/apt /var/log/dpkg.log /var/log/alternatives.log /var/cache/ldconfig/aux-cache
rm -f /var/cache/debconf/*-old /var/lib/dpkg/*-old
"""
"""Run by the image's own shell with the packages as arguments. Only a Debian image gets the host's sources."""


@dataclass(frozen=True, slots=True)
class AptSource:
    """One URI that the host's apt reads ``suites`` from."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    keyring: str = ""  # path; empty: apt's trusted keys


def parse_sources(files: Mapping[str, str]) -> tuple[AptSource, ...]:
    """Binary package sources in the text of apt's files by name: ``*.list`` (a line each) and ``*.sources``."""
    return tuple(
        source
        for name, text in sorted(files.items())
        for source in (_from_stanzas(text) if name.endswith(".sources") else _from_lines(text))
    )


def _from_lines(text: str) -> Iterator[AptSource]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)]\s*)?(\S+)\s+([^#]*)", line)
        if match and (words := match[3].split()):
            options = dict(option.partition("=")[::2] for option in (match[1] or "").split())
            yield AptSource(match[2], (words[0],), tuple(words[1:]), _path(options.get("signed-by", "")))


def _from_stanzas(text: str) -> Iterator[AptSource]:
    uncommented = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n[ \t]*\n", uncommented):
        fields = {
            name.lower(): value.strip() for name, value in re.findall(r"(?m)^([\w-]+):(.*(?:\n[ \t].*)*)", stanza)
        }
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        suites, components = (tuple(fields.get(name, "").split()) for name in ("suites", "components"))
        for uri in fields.get("uris", "").split():
            yield AptSource(uri, suites, components, _path(fields.get("signed-by", "")))


def _path(signed_by: str) -> str:
    """Keys may also be given inline or by fingerprint: then they are among apt's trusted ones or of no use to us."""
    return signed_by if re.fullmatch(r"/[^\s,]+", signed_by) else ""


def debian_lines(sources: Sequence[AptSource], host_suite: str, suite: str) -> tuple[str, ...]:
    """The one-line sources of ``suite`` in the archives that the host gets its own ``host_suite`` from.

    Raises AlveoleError(UNSUPPORTED) if the host has none, or has one with a password, which would stay in the image.
    """
    wanted = {host_suite: suite}
    if suite not in _ROLLING:
        wanted |= {f"{host_suite}-{part}": f"{suite}-{part}" for part in ("updates", "security")}
    lines = []
    for source in sources:
        if "main" not in source.components or (source.keyring and "debian-archive" not in source.keyring):
            continue
        if "@" in source.uri.partition("://")[2].partition("/")[0]:
            raise unsupported(
                "the host's apt sources contain a password, which would become part of the image",
                hint="use a mirror without a password for Debian",
            )
        option = f"[signed-by={source.keyring}] " if source.keyring else ""
        lines += [f"deb {option}{source.uri} {wanted[name]} main" for name in source.suites if name in wanted]
    if not any(f" {suite} main" in line for line in lines):
        raise unsupported(
            f"the host's apt sources name no Debian archive to build {suite} from",
            hint=f"add one with suite {host_suite or 'of this Debian'} and component main to /etc/apt/sources.list",
        )
    return tuple(dict.fromkeys(lines))


def host_lines(suite: str) -> tuple[str, ...]:
    """``debian_lines`` of this host."""
    apt = Path("/etc/apt")
    paths = [apt / "sources.list", *apt.glob("sources.list.d/*.list"), *apt.glob("sources.list.d/*.sources")]
    sources = parse_sources({str(path): path.read_text() for path in paths if path.exists()})
    release = Path("/etc/os-release").read_text()
    codename = re.search(r'(?m)^VERSION_CODENAME="?([a-z]+)', release)
    return debian_lines(sources, codename[1] if codename else "", suite)


async def write_apt_files(directory: Path, lines: Sequence[str]) -> None:
    """Write what apt needs for a build: ``sources.list``, ``apt.conf`` (the host's proxies), ``preferences``, keys.

    ``sources.list`` names the keys as seen inside, below ``APT_INSIDE``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dump = (await run(("apt-config", "dump"), timeout_s=30)).text.splitlines()
    (directory / "apt.conf").write_text("".join(f"{line}\n" for line in dump if _KEPT_APT_OPTIONS.fullmatch(line)))
    (directory / "preferences").write_text(_PREFERENCES)
    keyrings = sorted({match[1] for line in lines if (match := re.search(r"signed-by=([^]]+)]", line))})
    text = "".join(f"{line}\n" for line in lines)
    for number, keyring in enumerate(keyrings):
        name = f"{number}{Path(keyring).suffix}"
        (directory / name).write_bytes(Path(keyring).read_bytes())
        text = text.replace(f"signed-by={keyring}]", f"signed-by={APT_INSIDE}/{name}]")
    (directory / "sources.list").write_text(text)


async def bootstrap_identity(suite: str) -> tuple[str, ...]:
    """What a base layer depends on, for its cache key: all but the archive's contents of the day."""
    version = (await run(("mmdebstrap", "--version"), timeout_s=30)).text.strip()
    architecture = (await run(("dpkg", "--print-architecture"), timeout_s=30)).text.strip()
    return (version, architecture, suite, *_BOOTSTRAP_OPTIONS, *host_lines(suite))


async def bootstrap(suite: str, work: Path, output: Path, *, timeout_s: float) -> None:
    """Make the base layer of ``suite`` as the tar ``output``. ``work`` is ours, for its temporary files.

    Raises AlveoleError: INVALID if the host's archives have no such suite, INTERNAL with mmdebstrap's last words.
    """
    apt = work / "apt"
    lines = host_lines(suite)
    await write_apt_files(apt, lines)
    mirror = work / "mirror.list"
    mirror.write_text("".join(f"{line}\n" for line in lines))
    uploads = {"apt.conf": "/etc/apt/apt.conf.d/99build", "preferences": "/etc/apt/preferences.d/build"}
    hooks = (f"--setup-hook=upload {shlex.quote(str(apt / name))} {inside}" for name, inside in uploads.items())
    result = await run(
        (*_ENDS_WITH_US, "mmdebstrap", *_BOOTSTRAP_OPTIONS, *hooks, suite, str(output), str(mirror)),
        timeout_s=timeout_s,
        env={"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH_S), "TMPDIR": str(work)},
        check=False,
    )
    if b"does not have a Release file" in result.stderr:
        hint = "the host's apt sources say where it was looked for"
        raise invalid(f"Debian has no suite {suite}", hint=hint, field="base")
    if result.code != 0:
        raise result.failure()
