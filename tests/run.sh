#!/usr/bin/env bash
# Installs into .venv what is missing, then runs the tests: bash tests/run.sh [pytest arguments]
# Without arguments in stages, from the quick to the slow, and no further than the first that fails; `-n 2` needs two cores.
# The last has an environment of its own, .venv-vllm, and is skipped by name where that cannot be had.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash recipes/install.sh

stage() {
    local title="$1" venv="$2" began=$SECONDS code=0
    shift 2
    printf '\n== %s ==\n' "$title"
    "$venv/bin/python" -m pytest "$@" || code=$?
    printf '== %s: %s after %d min %02d s ==\n' \
        "$title" "$( ((code)) && echo FAILED || echo passed)" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
    return "$code"
}

if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi
vllm=tests/integration/vllm_rollout
stage "1 of 3: maths, files, commands" .venv -n 2 --dist loadfile --ignore tests/integration tests
stage "2 of 3: verl's real trainer" .venv --ignore "$vllm" tests/integration
code=0
bash recipes/install.sh --rollout vllm || code=$?
case "$code" in
    0) stage "3 of 3: verl's own vLLM rollout" .venv-vllm "$vllm" ;;
    3) printf '\n== 3 of 3: verl'"'"'s own vLLM rollout: SKIPPED, it cannot be had on this machine (see above) ==\n' ;;
    *) exit "$code" ;;
esac
