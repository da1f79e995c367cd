"""One run of verl's real trainer beside the plain loop's: do their weights and predictions go the same way?

The same base, questions, learning rate and batch; samples differ, as they do between two seeds of the loop. So verl's run
has to lie as near to each seed as the seeds lie to one another.
"""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import data
import pandas as pd
import torch
import training
from schedule import Schedule

from relex_verl.trajectory.store import Trajectory
from study.grid import PROMPTS, SAMPLES, Grid, Run
from study.predict import Prefix, load_prefix, predicted_deltas
from study.score import accuracies
from study.task import load_model, load_questions

NAME = "verl"


def learning_rate(grid: Grid) -> float:
    """The middle one."""
    return grid.learning_rates[len(grid.learning_rates) // 2]


def train_with_verl(grid: Grid, base: Path, out: Path) -> None:
    """verl's trainer up to the end of the longest prefix, observed by the plugin; a finished run is skipped."""
    cut, folder = grid.cuts[-1], (out / NAME).absolute()
    if (folder / "relex" / "report.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(grid.steps, cut, (grid.steps,), full=False)
    options = training.overrides(schedule, base, data.write(folder / "data"), folder, 1, "fsdp")
    batch = [
        f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        f"actor_rollout_ref.rollout.n={SAMPLES}",
        f"actor_rollout_ref.actor.optim.lr={learning_rate(grid)}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.logger=[console,file]",
        "relex.validate_targets=false",
    ]
    with open(folder / "log.txt", "w") as log:
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *options, *batch]
        done = subprocess.run(
            command, cwd=folder, env=training.environment(folder), stdout=log, stderr=log, check=False
        )
    if done.returncode:
        raise RuntimeError(f"verl's trainer failed; all of it: {folder / 'log.txt'}")


def compare_with_verl(grid: Grid, base: Path, out: Path) -> None:
    """Write agreement.csv: cosine and norm ratio of the deltas of each pair, and the accuracy of each run's prediction."""
    cut, path = grid.cuts[-1], out / "agreement.csv"
    if path.exists():
        return
    train_with_verl(grid, base, out)
    loops = {
        f"loop, seed {seed}": load_prefix(
            Trajectory(out / Run(learning_rate(grid), seed).name / "trajectories" / f"fp32-int8-cut{cut}"), cut
        )
        for seed in grid.seeds
    }
    prefixes = {NAME: load_prefix(Trajectory(out / NAME / "relex" / "trajectory"), cut), **loops}
    found = {name: _deltas(prefix, grid.steps) for name, prefix in prefixes.items()}
    pairs = [_pair(one, other, found[one], found[other]) for one, other in combinations(found, 2)]
    scored = [_scores(name, prefixes[name], deltas, base) for name, deltas in found.items()]
    pd.DataFrame([*pairs, *scored]).to_csv(path, index=False, float_format="%.6g", lineterminator="\n")


def _deltas(prefix: Prefix, target: int) -> dict[str, dict[str, torch.Tensor]]:
    """ "observed": the last row, "predicted": relex's of the target; name -> (n,) float64."""
    predicted = predicted_deltas(prefix, [("relex", target)])
    return {
        "observed": {name: delta_Tn[-1] for name, delta_Tn in zip(prefix.window.names, prefix.deltas, strict=True)},
        "predicted": {name: delta_1n[0] for name, delta_1n in zip(prefix.window.names, predicted, strict=True)},
    }


def _pair(one: str, other: str, first: dict, second: dict) -> dict[str, float | str]:
    row: dict[str, float | str] = {"first": one, "second": other}
    for what in ("observed", "predicted"):
        a = torch.cat([first[what][name] for name in sorted(first[what])])
        b = torch.cat([second[what][name] for name in sorted(second[what])])
        row[f"{what}_cosine"] = float(a @ b / a.norm() / b.norm())
        row[f"{what}_norm_ratio"] = float(a.norm() / b.norm())
    return row


def _scores(name: str, prefix: Prefix, deltas: dict, base: Path) -> dict[str, float | str]:
    model, (_, test) = load_model(base), load_questions(base)
    origins = dict(zip(prefix.window.names, prefix.origins, strict=True))
    row: dict[str, float | str] = {"first": name, "second": ""}
    for what, of_tensors in deltas.items():
        weights = {tensor: (origins[tensor], delta) for tensor, delta in of_tensors.items()}
        row[f"{what}_accuracy"] = float(accuracies(model, weights, test)["accuracy"])
    return row
