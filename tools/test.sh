#!/usr/bin/env bash
# Every check and every tier of tests, in order; one failure does not hide those after it.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

tools/setup.sh test || exit
failed=0
results=.cache/test
rm -rf "$results" && mkdir -p "$results"

tier() { # name, then arguments of pytest
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    .venv/bin/python -m pytest --tier "$results/$name" -m 'not slow' "$@" </dev/null || failed=1
}

tools/check.sh || failed=1
printf '\n== host\n'
.venv/bin/alveole doctor || .venv/bin/alveole doctor --fix || failed=1
tier unit tests/unit --numprocesses 2
tier style tests/style --numprocesses 2
tier conformance tests/conformance --numprocesses 2
tier integration tests/integration
tier fault tests/fault

printf '\n== tiers\n'
awk -F '\t' '{ printf "%-12s %5d passed %4d failed %4d skipped %8.1f s\n", FILENAME, $1, $2, $3, $4
               passed += $1; failed += $2; skipped += $3; seconds += $4 }
     END { printf "===== %d passed, %d failed, %d skipped in %.2fs =====\n", passed, failed, skipped, seconds }' \
    "$results"/{unit,style,conformance,integration,fault} | sed "s|^$results/||"
((failed == 0)) || echo "make test: FAILED" >&2
exit "$failed"
