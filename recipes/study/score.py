"""Score every prediction of one run on the test questions and compare it with the weights the run itself reached."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

from relex_verl.trajectory.store import Trajectory
from study.grid import ONE_TARGET, Arm, Grid, Run
from study.predict import Wanted, agreement, load_prefix, predicted_deltas, share_equal_to_product
from study.task import Questions, greedy_correct, load_model, load_questions
from study.train import Progress, load_weights

COLUMNS = (
    "learning_rate",
    "seed",
    "trajectory",
    "rows",
    "cut",
    "method",
    "target",
    "horizon",
    "accuracy",
    "accuracy_select",
    "accuracy_report",
    "cosine",
    "norm_ratio",
    "bits_equal_to_product",
)
Row = dict[str, float | int | str]


def wanted_predictions(arm: Arm, grid: Grid, cut: int) -> list[Wanted]:
    """(method, target) of all predictions of an arm; the arm with a row each step only shows that a dozen are as good."""
    targets = grid.targets[cut] if arm.every_target else (grid.steps,)
    return [(method, target) for method in arm.methods for target in targets]


def planned_scores(grid: Grid) -> int:
    """Predictions of one run."""
    arms = grid.arms(Run(grid.learning_rates[0], grid.seeds[-1]))
    return sum(len(wanted_predictions(arm, grid, cut)) for arm in arms for cut in grid.cuts)


def score_run(run: Run, grid: Grid, base: Path, out: Path, progress: Progress) -> None:
    """Write `predictions.csv` of a run, unless it is there."""
    path = out / run.name / "predictions.csv"
    if path.exists():
        progress(planned_scores(grid))
        return
    model, (_, test) = load_model(base), load_questions(base)
    rows = [
        {"learning_rate": run.learning_rate, "seed": run.seed, **row}
        for arm in grid.arms(run)
        for cut in grid.cuts
        for row in score_prefix(out / run.name, arm, grid, cut, model, test, progress)
    ]
    write_csv(path, COLUMNS, rows)


def score_prefix(
    folder: Path, arm: Arm, grid: Grid, cut: int, model: Qwen2ForCausalLM, test: Questions, progress: Progress
) -> Iterator[Row]:
    """All predictions of one arm from one prefix."""
    wanted = wanted_predictions(arm, grid, cut)
    if not wanted:
        return
    trajectory = Trajectory(folder / "trajectories" / arm.trajectory(cut))
    prefix = load_prefix(trajectory, cut)
    predicted = predicted_deltas(prefix, wanted)
    checked = ("relex", wanted[-1][1])
    scores: dict[Wanted, Row] = {}
    for k, (method, target) in enumerate(wanted):
        guess = [delta_Kn[k] for delta_Kn in predicted]
        row: Row = {
            "trajectory": arm.name,
            "rows": len(prefix.window.steps),
            "cut": cut,
            "method": method,
            "target": target,
        }
        row["horizon"] = round(target / cut, 2)
        score_of = (method, 0 if method in ONE_TARGET else target)
        if score_of not in scores:
            weights = zip(prefix.origins, guess, strict=True)
            scores[score_of] = accuracies(model, dict(zip(prefix.window.names, weights, strict=True)), test)
        row |= scores[score_of]
        if target <= grid.steps:
            truth = load_weights(folder / "weights", target)
            deltas = [
                truth[name].flatten().double() - origin
                for name, origin in zip(prefix.window.names, prefix.origins, strict=True)
            ]
            found = agreement(guess, deltas)
            row |= {"cosine": found.cosine, "norm_ratio": found.norm_ratio}
        if (method, target) == checked:
            row["bits_equal_to_product"] = share_equal_to_product(trajectory, cut, prefix, checked)
        progress(1)
        yield row


@torch.no_grad()
def accuracies(
    model: Qwen2ForCausalLM, weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]], test: Questions
) -> Row:
    """Greedy accuracy of theta_0 + delta, rounded to bfloat16: on all test questions, and on each half of them."""
    for name, parameter in model.named_parameters():
        origin, delta = weights[name]
        parameter.copy_((origin + delta).view(parameter.shape))
    correct = greedy_correct(model, test).float()
    return {
        "accuracy": correct.mean().item(),
        "accuracy_select": correct[::2].mean().item(),
        "accuracy_report": correct[1::2].mean().item(),
    }


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write rows of numbers, six digits each."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    temporary.rename(path)
