"""`bash tests/run.sh`: which stages it runs, and that it ends with the first that fails. Nothing is installed or tested."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
[[ "$*" != *"$(cat failing)"* ]]
"""


def stages(folder: Path, *arguments: str, failing: str = "nothing", vllm: int = 0) -> tuple[int, list[str], str]:
    """Exit code, what the interpreters were called with, and what was printed, of a copy of the script among stand-ins.

    Args:
        folder: where the copy goes.
        arguments: of the script.
        failing: part of the call that fails.
        vllm: exit code of the installation of vLLM.
    """
    for name in ("tests", "recipes", ".venv/bin", ".venv-vllm/bin"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "run.sh", folder / "tests")
    (folder / "recipes" / "install.sh").write_text(f'echo "installed $*" >>calls; [[ -z "$*" ]] || exit {vllm}\n')
    for python, said in ((".venv/bin/python", ""), (".venv-vllm/bin/python", "vllm: ")):
        (folder / python).write_text(PYTHON.replace("$*", f"{said}$*", 1))
        (folder / python).chmod(0o755)
    (folder / "failing").write_text(failing)
    done = subprocess.run(["bash", folder / "tests/run.sh", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, (folder / "calls").read_text().splitlines(), done.stdout


def test_the_quick_ones_on_two_cores_then_the_trainer_then_vllm(tmp_path: Path) -> None:
    code, (installed, quick, trainer, more, vllm), printed = stages(tmp_path)
    assert (code, installed, more) == (0, "installed ", "installed --rollout vllm")
    assert quick.startswith("-m pytest -n 2 ")
    assert "--ignore tests/integration" in quick
    # One process: its runs share the machine's two cores already.
    assert trainer == "-m pytest --ignore tests/integration/vllm_rollout tests/integration"
    assert vllm == "vllm: -m pytest tests/integration/vllm_rollout"
    assert (ROOT / vllm.split()[-1]).is_dir()
    assert printed.count("passed after 0 min 0") == 3


@pytest.mark.parametrize(
    ("failing", "calls"), [("-n 2", 2), ("pytest --ignore tests/integration", 3), ("pytest tests/integration/vllm", 5)]
)
def test_the_first_failure_ends_it(failing: str, calls: int, tmp_path: Path) -> None:
    code, called, printed = stages(tmp_path, failing=failing)
    assert (code, len(called)) == (1, calls)
    assert printed.count("FAILED after") == 1


@pytest.mark.parametrize(("exits", "code", "skipped"), [(3, 0, 1), (1, 1, 0)])
def test_where_vllm_cannot_be_had_its_stage_is_skipped_by_name(
    exits: int, code: int, skipped: int, tmp_path: Path
) -> None:
    """Only there: an installation that fails otherwise is a failure."""
    found, called, printed = stages(tmp_path, vllm=exits)
    assert (found, len(called)) == (code, 4)
    assert printed.count("3 of 3: verl's own vLLM rollout: SKIPPED, it cannot be had on this machine") == skipped


def test_arguments_are_pytests(tmp_path: Path) -> None:
    assert stages(tmp_path, "tests/maths", "-k", "gram")[:2] == (0, ["installed ", "-m pytest tests/maths -k gram"])
