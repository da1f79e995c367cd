"""Runs verl's real trainer on the CPU through the quickstart's glue, small, and reads back what it left."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(RECIPE))

import base_model  # noqa: E402
import data  # noqa: E402
import training  # noqa: E402
from schedule import Schedule  # noqa: E402

BASE = Path(os.environ.get("TEST_BASE") or RECIPE / ".cache" / "base")
PROMPTS = 8
SAMPLES = 4
VALIDATION_PROMPTS = 64
TRAINED = (
    "critic/score/mean",
    "critic/rewards/mean",
    "actor/pg_loss",
    "actor/grad_norm",
    "actor/entropy",
    "response_length/mean",
)


@dataclass(frozen=True)
class Run:
    """A finished (or killed) run.

    Attributes:
        out: its folder; RELEX's is `relex` in it.
        code: exit status.
        log: what it printed.
    """

    out: Path
    code: int
    log: str

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        """step -> everything that verl's file logger got."""
        return dict(training.read_metrics(self.out))

    def trained(self) -> dict[int, dict[str, float]]:
        """step -> what training alone decides: rewards, losses, gradient norms."""
        return {
            step: {name: values[name] for name in TRAINED if name in values}
            for step, values in self.metrics.items()
            if "actor/grad_norm" in values
        }

    def report(self) -> dict[str, Any]:
        """RELEX's report.json."""
        return json.loads((self.out / "relex" / "report.json").read_text())

    def complaints(self) -> list[str]:
        """Lines by which RELEX says that it failed."""
        return re.findall(r"RELEX failed and is switched off.*", self.log)


def command(
    out: Path,
    steps: int,
    strategy: str = "fsdp",
    ranks: int = 1,
    relex: Sequence[str] | None = (),
    extra: Sequence[str] = (),
    option: str = "default",
) -> list[str]:
    """The command line of a small run; `relex=None` leaves RELEX out, `option` chooses the mode."""
    base_model.build(BASE)
    files = data.write(out / "data")
    schedule = Schedule(steps, steps, (2 * steps,), full=True)
    plain = [
        one
        for one in training.overrides(schedule, BASE, files, out, ranks, strategy)
        if not one.startswith(("+relex", "relex."))
    ]
    small = [
        f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        f"actor_rollout_ref.rollout.n={SAMPLES}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={PROMPTS * SAMPLES // ranks}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={PROMPTS * SAMPLES // ranks}",
        f"data.val_max_samples={VALIDATION_PROMPTS}",
        "trainer.val_before_train=False",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "actor_rollout_ref.actor.optim.lr=1e-5",
    ]
    ours = [] if relex is None else [f"+relex={option}", f"relex.output_dir={out / 'relex'}", *relex]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *plain, *small, *ours, *extra]


def environment(out: Path, **more: str) -> dict[str, str]:
    """The quickstart's environment, with this folder's modules importable in every worker."""
    env = training.environment(out)
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), env["PYTHONPATH"]])
    (out / "wandb").mkdir(parents=True, exist_ok=True)
    return {**env, **more}


def run(out: Path, steps: int, env: dict[str, str] | None = None, timeout: int = 600, **options: Any) -> Run:
    """Run to the end."""
    line = command(out, steps, **options)
    with open(out / "log.txt", "a") as log:
        done = subprocess.run(
            line,
            cwd=out,
            env=environment(out, **(env or {})),
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
    return Run(out, done.returncode, (out / "log.txt").read_text(errors="replace"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def relex_verl(*arguments: str) -> str:
    """The installed command; its output."""
    script = Path(sys.executable).parent / "relex-verl"
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=True).stdout


def checkout(run: Run, step: int) -> dict[str, torch.Tensor]:
    """The weights of an observed step, by the command line."""
    folder = run.out / f"checkout-{step}"
    if not folder.exists():
        relex_verl("checkout", str(run.out / "relex" / "trajectory"), "--step", str(step), "--out", str(folder))
    return load(folder)
