#!/usr/bin/env bash
# The paper's Figure 2, Figure 6 and Table 3 from one small run that is recorded whole:
# bash recipes/paper_figures/run.sh [--out DIR] [--steps N] [--quick] [--publish] [--dry-run]
# A quickstart run of 200 steps on the CPU, and its analysis. Run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ -f recipes/install.sh ]]; then
    bash recipes/install.sh
fi
export PYTHONPATH="recipes:recipes/quickstart${PYTHONPATH:+:$PYTHONPATH}"
exec .venv/bin/python -m paper_figures "$@"
