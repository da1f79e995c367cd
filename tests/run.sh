#!/usr/bin/env bash
# Installs into .venv what is missing, then runs the tests: bash tests/run.sh [pytest arguments]
# Without arguments in stages, from the quick to the slow, and no further than the first that fails; `-n 2` needs two cores.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash recipes/install.sh

stage() {
    local title="$1" began=$SECONDS code=0
    shift
    printf '\n== %s ==\n' "$title"
    .venv/bin/python -m pytest "$@" || code=$?
    printf '== %s: %s after %d min %02d s ==\n' \
        "$title" "$( ((code)) && echo FAILED || echo passed)" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
    return "$code"
}

if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi
stage "1 of 2: maths, files, commands" -n 2 --dist loadfile --ignore tests/integration tests
stage "2 of 2: verl's real trainer" tests/integration
