#!/usr/bin/env bash
# A real GRPO run with RELEX on, on a machine with Python and pip; bash run.sh --help tells more.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
rollout=cpu venv=.venv
options=" $* "
case "${options%% -- *} " in # what follows -- is verl's
    *" --rollout vllm "* | *" --rollout=vllm "*) rollout=vllm venv=.venv-vllm ;;
esac
bash "$root/recipes/install.sh" --rollout "$rollout"
exec "$root/$venv/bin/python" "$root/recipes/quickstart/quickstart.py" "$@"
