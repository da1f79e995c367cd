#!/usr/bin/env bash
# Installs into .venv what is missing, then runs the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash recipes/install.sh
exec .venv/bin/python -m pytest "$@"
