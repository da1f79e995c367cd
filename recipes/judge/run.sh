#!/usr/bin/env bash
# Counts wrong decisions in simulated runs with a known truth: bash recipes/judge/run.sh [--runs N] [--out FILE]
# A table of wrong stops, wrong jumps and power; an hour or two on one core with the default of 2000 runs a row.
set -euo pipefail
cd "$(dirname "$0")/../.."

bash recipes/install.sh
export PYTHONPATH="recipes${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1
exec .venv/bin/python -m judge "$@"
