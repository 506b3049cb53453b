#!/usr/bin/env bash
# All static checks. Every one runs, so that one run shows all that is wrong.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PATH=$PWD/.venv/bin:$PATH

failed=()
check() {
    printf '== %s\n' "$*"
    "$@" || failed+=("$1 ${2:-}")
}
check ruff check --quiet
check ruff format --check --quiet
check mypy
check lint-imports --no-logo
check shellcheck tools/*.sh .ci/run src/alveole/runtime/qemu/guest/*

((${#failed[@]} == 0)) || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
