#!/usr/bin/env bash
# Install what Alveole needs on Debian 12, and its virtual environment. Safe to run again: then it only looks.
#   tools/setup.sh run     to run Alveole
#   tools/setup.sh test    ... and to check and test it
#   tools/setup.sh bench   ... and to measure it beside its peers
set -euo pipefail
cd "$(dirname "$0")/.."

RUN_PACKAGES=(
    busybox-static ca-certificates conmon cpio crun dropbear-bin e2fsprogs golang-github-containers-common iproute2
    kmod libnftables1 mount nftables openssh-client python3 python3-venv skopeo xfsprogs xorriso zstd
)
# Debian 12 itself has these too old or not at all.
BACKPORTS_PACKAGES=(
    linux-image-amd64 mmdebstrap qemu-system-common qemu-system-data qemu-system-x86 qemu-utils runsc seabios
)
TEST_PACKAGES=(curl docker-registry extlinux git make redis-tools shellcheck sqlite3)
BENCH_PACKAGES=(docker.io iperf3 wrk)

BACKPORTS=bookworm-backports
BACKPORTS_SOURCE=/etc/apt/sources.list.d/alveole-backports.sources
POLICY=/usr/sbin/policy-rc.d
VENV=.venv

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

quietly() { # shows what a command printed only if it fails
    mkdir -p .cache
    "$@" </dev/null >.cache/setup.log 2>&1 || { cat .cache/setup.log >&2; die "failed: $*"; }
}

# --- Debian packages

missing_packages() { # prints those of its arguments that are not installed
    local package
    for package in "$@"; do
        [[ $(dpkg-query --show --showformat '${db:Status-Abbrev}' "$package" 2>/dev/null) == ii* ]] || echo "$package"
    done
}

missing_backports() { # a package of the same name may have come from Debian 12 itself: too old
    local package version
    for package in "${BACKPORTS_PACKAGES[@]}"; do
        version=$(dpkg-query --show --showformat '${db:Status-Abbrev}${Version}' "$package" 2>/dev/null) || true
        [[ $version == ii*~bpo12+* ]] || echo "$package/$BACKPORTS"
    done
}

debian_source() { # URI and key of the source that this host gets Debian 12 itself from
    local uri keys
    uri=$(apt-get indextargets --format "\$(RELEASE) \$(COMPONENT) \$(REPO_URI)" 'Created-By: Packages' |
        awk '$1 == "bookworm" && $2 == "main" && !found { print $3; found = 1 }')
    keys=$(cat /etc/apt/sources.list.d/*.sources 2>/dev/null |
        awk 'BEGIN { RS = ""; FS = "\n" } /\nSuites:[^\n]* ?bookworm( |\n)/ || /\nSuites: bookworm$/ {
                 for (i = 1; i <= NF; i++) if (!found && sub(/^Signed-By: */, "", $i)) { print $i; found = 1 } }')
    echo "${uri:-http://deb.debian.org/debian} ${keys:-/usr/share/keyrings/debian-archive-keyring.gpg}"
}

ensure_backports_source() {
    local targets found uri keys
    targets=$(apt-get indextargets --format "\$(RELEASE)" 'Created-By: Packages')
    [[ $'\n'$targets$'\n' != *$'\n'$BACKPORTS$'\n'* ]] || return 0
    found=$(debian_source)
    read -r uri keys <<<"$found"
    say "adding $BACKPORTS from $uri in $BACKPORTS_SOURCE"
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "$uri" "$BACKPORTS" "$keys" |
        as_root tee "$BACKPORTS_SOURCE" >/dev/null
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "needs root to run: $*"
    fi
}

forbid_services() { # packages must not start daemons (docker-registry, redis, docker) on this host
    [[ ! -e $POLICY ]] || return 0
    trap allow_services EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$POLICY" >/dev/null
    as_root chmod 755 "$POLICY"
}

allow_services() { as_root rm -f "$POLICY"; }

ensure_packages() {
    local listed missing
    listed=$(missing_packages "$@" && missing_backports)
    [[ $listed ]] || return 0
    mapfile -t missing <<<"$listed"
    grep -q '^VERSION_CODENAME=bookworm$' /etc/os-release || die "this is not Debian 12; install by hand: ${missing[*]}"
    say "installing ${missing[*]}"
    ensure_backports_source
    forbid_services
    quietly as_root apt-get update --quiet=2
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends \
        -o Dpkg::Use-Pty=0 "${missing[@]}"
}

# --- The virtual environment

find_python() { # the host's own python3, else Debian's
    local python
    for python in "${PYTHON:-python3}" /usr/bin/python3; do
        if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    die "no Python 3.11 or newer with venv was found; name one with PYTHON="
}

ensure_venv() { # argument: the lock file to install from
    local lock=$1 stamp=$VENV/.installed want python
    want=$(cat "$lock" pyproject.toml | sha256sum)
    want="$PWD $lock $want"
    # The test environment holds all of the run environment: never go back from it.
    if [[ $lock == requirements/run.txt && -f $stamp ]] && grep -q 'requirements/dev.txt' "$stamp"; then
        ensure_venv requirements/dev.txt
        return
    fi
    [[ ! -f $stamp || $(<"$stamp") != "$want" ]] || return 0
    say "installing $lock in $VENV"
    python=$(find_python)
    "$python" -m venv --clear "$VENV"
    quietly "$VENV/bin/pip" install --require-hashes --no-deps --only-binary :all: --requirement "$lock"
    quietly "$VENV/bin/pip" install --no-index --no-build-isolation --no-deps --editable .
    echo "$want" >"$stamp"
}

case ${1:-} in
    run) packages=("${RUN_PACKAGES[@]}") lock=requirements/run.txt ;;
    test) packages=("${RUN_PACKAGES[@]}" "${TEST_PACKAGES[@]}") lock=requirements/dev.txt ;;
    bench) packages=("${RUN_PACKAGES[@]}" "${TEST_PACKAGES[@]}" "${BENCH_PACKAGES[@]}") lock=requirements/dev.txt ;;
    *) die "usage: tools/setup.sh run|test|bench" ;;
esac
ensure_packages "${packages[@]}"
ensure_venv "$lock"
