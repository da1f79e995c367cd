#!/usr/bin/env bash
# Runs the tests that need no verl on the oldest and newest Python, and with the oldest and newest dependencies, that
# pyproject.toml allows: bash tests/versions.sh [SET ...]
#
# Sets: 3.10-lowest 3.10-newest 3.12-newest (all of them if none is named). A Python that is not on this machine is
# skipped by name. Environments are kept in .cache/versions/ and made anew when their requirements change.
#
# Not part of tests/run.sh: the wheel of torch for Linux brings CUDA along, 2 GB to fetch and 5 GB on the disk for each
# Python. All sets of a Python share one torch, which is why "lowest" has this version of it and not the lower bound;
# LOWEST_TORCH=2.6.0 tries that, too. An index of CPU builds in PIP_EXTRA_INDEX_URL makes both small.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cache="$root/.cache/versions"
torch=2.13.0
lowest_torch="${LOWEST_TORCH:-$torch}"
# Another Python may have no pip that is new enough to find versions that fit together.
pip="pip>=25"
tools=("pytest>=8" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "hypothesis>=6")
needs_more='^(from|import) (verl|ray|hydra|transformers)\b'

say() { printf 'versions: %s\n' "$*" >&2; }

# The interpreter of a version such as 3.10: on PATH, or pyenv's. A shim of pyenv may stand for nothing.
find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# The dependencies of pyproject.toml but torch, one a line, and the baselines' scikit-learn; for "lowest", exactly their
# lower bounds.
requirements() {
    local bounds
    bounds="$(sed -n '/^dependencies = \[/,/^\]/s/^ *"\(.*\)",$/\1/p; s/^ *"\(scikit-learn.*\)",$/\1/p' \
        "$root/pyproject.toml" | grep -v '^torch')"
    [[ "$1" == lowest ]] && bounds="${bounds//>=/==}"
    printf '%s\n' "$bounds"
}

# Makes a virtual environment with these requirements, or leaves one that has them already:
# environment PYTHON FOLDER BORROWED REQUIREMENT ...   (BORROWED: an environment whose packages it sees, or "")
environment() {
    local python="$1" folder="$2" borrowed="$3" wanted
    shift 3
    wanted="$(printf '%s\n' "$borrowed" "$@")"
    if [[ -f "$folder/.requirements" && "$(<"$folder/.requirements")" == "$wanted" ]]; then
        return
    fi
    say "making ${folder#"$root"/}"
    rm -rf "$folder" && "$python" -m venv "$folder" || return
    if [[ -n "$borrowed" ]]; then
        packages_of "$borrowed" >"$(packages_of "$folder")/borrowed.pth" || return
    fi
    "$folder/bin/python" -m pip install --quiet --upgrade "$pip" &&
        "$folder/bin/python" -m pip install --quiet --upgrade "$@" &&
        printf '%s' "$wanted" >"$folder/.requirements"
}

packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# The tests of everything below the command line and the plugin, without those that import what is not installed.
tests() {
    grep -rLE "$needs_more" "$root"/tests/{maths,trajectory,pipeline,reporting,run,offline,cli} \
        --include='test_*.py' | sort
}

# Prints one row of the table; its log is beside the environment.
try() {
    local name="$1" version="${1%%-*}" kind="${1#*-}" began=$SECONDS python torch_version result status=0
    local -a wanted files
    if ! python="$(find_python "$version")"; then
        printf '%-12s  skipped: no python%s on PATH or in pyenv\n' "$name" "$version"
        return
    fi
    torch_version="$torch"
    [[ "$kind" == lowest ]] && torch_version="$lowest_torch"
    mapfile -t wanted < <(requirements "$kind")
    mapfile -t files < <(tests)
    {
        environment "$python" "$cache/$version-torch-$torch_version" "" "torch==$torch_version" &&
            environment "$python" "$cache/$name" "$cache/$version-torch-$torch_version" "${wanted[@]}" "${tools[@]}" &&
            "$cache/$name/bin/python" -m pip list --format freeze &&
            PYTHONPATH="$root" "$cache/$name/bin/python" -m pytest -p no:cacheprovider "${files[@]}"
    } >"$cache/$name.log" 2>&1 || status=$?
    result="$(grep -E '^[0-9]+ (passed|failed|error)' "$cache/$name.log" | tail -n 1)" || true
    printf '%-12s  torch %-8s  %s  (%d s, %s)\n' "$name" "$torch_version" "${result:-did not run}" \
        $((SECONDS - began)) "${cache#"$root"/}/$name.log"
    return "$status"
}

cd "$root"
(($#)) || set -- 3.10-lowest 3.10-newest 3.12-newest
mkdir -p "$cache"
table=() failed=0
for name in "$@"; do
    if [[ ! "$name" =~ ^3\.[0-9]+-(lowest|newest)$ ]]; then
        say "$name: give sets such as 3.10-lowest or 3.12-newest"
        exit 2
    fi
    say "$name ..."
    row="$(try "$name")" || failed=1
    table+=("$row")
done
printf '%s\n' "${table[@]}"
exit "$failed"
