#!/usr/bin/env bash
# What a GPU has to confirm, in one command and a few minutes: bash tests/gpu/run.sh [--scale 1.0] [--rows 4] [--json FILE]
# Needs a Python with torch (CUDA), numpy, safetensors and psutil, as ${PYTHON:-python3}, and this folder; no verl.
# Without a GPU it runs on the CPU, where --scale 0.001 is enough to see that it works.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/tests/gpu/check.py" "$@"
