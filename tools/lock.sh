#!/usr/bin/env bash
# Compile requirements/*.txt: every version pinned, every file hashed, no registry named.
set -euo pipefail
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
uv_venv=.cache/uv

[[ -x $uv_venv/bin/uv ]] || { python3 -m venv "$uv_venv" && "$uv_venv/bin/pip" install --quiet "uv==$UV_VERSION"; }
compile() {
    "$uv_venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --no-emit-find-links --custom-compile-command "make lock" --extra server "$@"
}
compile pyproject.toml requirements/run.in --output-file requirements/run.txt
compile pyproject.toml requirements/run.in requirements/dev.in --constraint requirements/run.txt \
    --output-file requirements/dev.txt
