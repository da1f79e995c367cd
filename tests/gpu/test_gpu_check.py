"""The check for a GPU, on the CPU: it runs to its end, without verl and what else a bare machine lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MISSING = ["verl", "ray", "wandb", "hydra", "omegaconf", "transformers", "typer", "rich", "matplotlib"]


def test_the_check_for_a_gpu_runs_without_one(tmp_path: Path) -> None:
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')\n")
    command = ["bash", str(HERE / "run.sh"), "--scale", "0.0002", "--rows", "2", "--json", str(tmp_path / "found.json")]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is confirmed by this" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["same files"] for one in found["kinds"]] == [True, True]
