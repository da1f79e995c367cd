#!/usr/bin/env bash
# A real GRPO run with RELEX on, on a machine with Python and pip; bash run.sh --help tells more.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
bash "$root/recipes/install.sh"
exec "$root/.venv/bin/python" "$root/recipes/quickstart/quickstart.py" "$@"
