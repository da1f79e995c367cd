#!/usr/bin/env bash
# Makes .venv at the repository's root with everything that the quickstart and the tests need.
# Skips what is there already, and waits for an installation that is under way. PYTHON=python3.11 chooses the interpreter (3.10 to 3.12).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/.relex-installed"
log="$venv/install.log"
lock="$root/.venv.lock"

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
step "pip (1/3)" "$venv/bin/python" -m pip install --upgrade "pip>=25"
# Exactly this version, and first: left to itself, pip would take gigabytes of CUDA libraries along.
step "torch 2.13.0 (2/3)" "$venv/bin/python" -m pip install "torch==2.13.0"
step "verl and relex-verl (3/3)" "$venv/bin/python" -m pip install -e "${root}[dev]"
wanted >"$stamp"
say "ready: $venv"
