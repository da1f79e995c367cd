#!/usr/bin/env bash
# Reruns the evidence behind relex-verl's defaults: bash recipes/study/run.sh [--out DIR] [--jump] [--quick] [--publish] [--help]
# 9 training runs of a 1M-parameter model on the CPU, their predictions and scores. Run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ -f recipes/install.sh ]]; then
    bash recipes/install.sh
fi
export PYTHONPATH="recipes:recipes/quickstart${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1
exec .venv/bin/python -m study "$@"
