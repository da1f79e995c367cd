"""How far quantised increments move a prediction: against the same rows kept as uncompressed float32 changes."""

from pathlib import Path

import torch

from relex_verl.maths.extrapolators import METHODS
from relex_verl.trajectory.store import Trajectory
from study.grid import ARMS, Arm, Grid, Run
from study.predict import Prefix, load_prefix, predicted_deltas
from study.score import Row, write_csv
from study.train import Progress

COLUMNS = (
    "learning_rate",
    "seed",
    "encoding",
    "spacing",
    "cut",
    "rows",
    "method",
    "target",
    "error_of_weights",
    "error_of_delta",
    "worst_tensor_error_of_delta",
    "error_of_last_state",
)
SHARES = (1 / 6, 1 / 3, 1 / 2, 3 / 4, 1)  # of the rows, to see whether the error grows with T


def quantization_run(run: Run, grid: Grid, out: Path, progress: Progress) -> None:
    """Write `quantization.csv` of a run, unless it is there."""
    path = out / run.name / "quantization.csv"
    if not path.exists():
        folder = out / run.name / "trajectories"
        exact = load_prefix(Trajectory(folder / "fp32-none"), grid.cuts[-1])
        rows = [
            {"learning_rate": run.learning_rate, "seed": run.seed, **row}
            for cut in grid.cuts
            for arm in (one for one in ARMS if one.encoding in ("fp32-int8", "fp32-int4"))
            for row in _errors(Trajectory(folder / arm.trajectory(cut)), arm, cut, exact, grid)
        ]
        write_csv(path, COLUMNS, rows)
    progress(1)


def _errors(trajectory: Trajectory, arm: Arm, cut: int, exact: Prefix, grid: Grid) -> list[Row]:
    """All methods from all rows to the end of the run; then relex from fewer rows, target and relative horizon fixed."""
    prefix = load_prefix(trajectory, cut)
    exact, end, all_rows = exact.chosen_rows(prefix.window.steps), grid.steps, len(prefix.window.steps)
    asked = [(all_rows, method, end) for method in METHODS]
    for rows in [round(share * all_rows) for share in SHARES] if cut == grid.cuts[-1] else []:
        proportional = round(prefix.window.steps[rows - 1] * end / prefix.window.steps[-1])
        asked += [(rows, "relex", target) for target in (end, proportional) if (rows, "relex", target) not in asked]
    found: list[Row] = []
    for rows, method, target in asked:
        row: Row = {"encoding": arm.encoding, "spacing": arm.spacing(cut), "cut": cut, "rows": rows}
        row |= {"method": method, "target": target}
        found.append(row | prediction_error(prefix.first_rows(rows), exact.first_rows(rows), method, target))
    return found


def prediction_error(prefix: Prefix, exact: Prefix, method: str, target: int) -> Row:
    """Relative differences in the Frobenius norm, over all tensors together unless named otherwise."""
    pairs = list(
        zip(predicted_deltas(prefix, [(method, target)]), predicted_deltas(exact, [(method, target)]), strict=True)
    )
    miss_L = torch.tensor([(one - other).norm() for one, other in pairs])
    delta_L = torch.tensor([other.norm() for _, other in pairs])
    weights_L = torch.tensor([(origin + other).norm() for origin, (_, other) in zip(exact.origins, pairs, strict=True)])
    last = [(one[-1] - other[-1], other[-1]) for one, other in zip(prefix.deltas, exact.deltas, strict=True)]
    state_L = torch.tensor([[miss.norm(), true.norm()] for miss, true in last])
    return {
        "error_of_weights": (miss_L.norm() / weights_L.norm()).item(),
        "error_of_delta": (miss_L.norm() / delta_L.norm()).item(),
        "worst_tensor_error_of_delta": (miss_L / delta_L)[delta_L > 0].max().item(),
        "error_of_last_state": (state_L[:, 0].norm() / state_L[:, 1].norm()).item(),
    }
