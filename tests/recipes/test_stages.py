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


def stages(folder: Path, *arguments: str, failing: str = "nothing") -> tuple[int, list[str], str]:
    """Exit code, what the interpreter was called with, and what was printed, of a copy of the script among stand-ins."""
    for name in ("tests", "recipes", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "run.sh", folder / "tests")
    (folder / "recipes" / "install.sh").write_text("echo installed >>calls\n")
    (folder / ".venv/bin/python").write_text(PYTHON)
    (folder / ".venv/bin/python").chmod(0o755)
    (folder / "failing").write_text(failing)
    done = subprocess.run(["bash", folder / "tests/run.sh", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, (folder / "calls").read_text().splitlines(), done.stdout


def test_the_quick_ones_on_two_cores_then_the_trainer(tmp_path: Path) -> None:
    code, (installed, quick, trainer), printed = stages(tmp_path)
    assert (code, installed) == (0, "installed")
    assert quick.startswith("-m pytest -n 2 ")
    assert "--ignore tests/integration" in quick
    assert trainer == "-m pytest tests/integration"  # one process: its runs share the machine's two cores already
    assert printed.count("passed after 0 min 0") == 2


@pytest.mark.parametrize(("failing", "calls"), [("-n 2", 2), ("pytest tests/integration", 3)])
def test_the_first_failure_ends_it(failing: str, calls: int, tmp_path: Path) -> None:
    code, called, printed = stages(tmp_path, failing=failing)
    assert (code, len(called)) == (1, calls)
    assert printed.count("FAILED after") == 1


def test_arguments_are_pytests(tmp_path: Path) -> None:
    assert stages(tmp_path, "tests/maths", "-k", "gram")[:2] == (0, ["installed", "-m pytest tests/maths -k gram"])
