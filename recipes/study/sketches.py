"""How far a sketch's prediction lies from that of all rows, uncompressed: for the prefix and for the whole run."""

from pathlib import Path

import torch
from safetensors import safe_open

from relex_verl.maths.extrapolators import METHODS, Prediction, fit_weights
from relex_verl.maths.window import Window
from relex_verl.pipeline.prediction import weighted_tensors
from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory
from study.grid import SKETCH, Grid, Run
from study.score import Row, write_csv
from study.train import Progress

COLUMNS = ("learning_rate", "seed", "size", "rows", "method", "target", "error_of_delta", "worst_tensor_error_of_delta")
AHEAD = (2, 400 / 60)  # targets, in lengths of the window


def sketch_run(run: Run, grid: Grid, out: Path, progress: Progress) -> None:
    """Write `sketch.csv` of a run, unless it is there."""
    path = out / run.name / "sketch.csv"
    if not path.exists():
        trajectory = Trajectory(out / run.name / "trajectories" / SKETCH)
        rows = [
            {"learning_rate": run.learning_rate, "seed": run.seed, **row}
            for cut in (grid.cuts[-1], grid.steps)
            for row in _errors(trajectory, out / run.name / "states.safetensors", cut)
        ]
        write_csv(path, COLUMNS, rows)
    progress(1)


def _errors(trajectory: Trajectory, states: Path, cut: int) -> list[Row]:
    """The product's prediction (its direction, its moments) against a dense one of the run's own float32 weights."""
    steps = trajectory.steps_until(cut)
    deltas = dense_deltas(states, cut)
    gram_LTT = torch.stack([deltas[name] @ deltas[name].T for name in trajectory.names])
    window = Window(trajectory.names, steps, gram_LTT)
    rows: list[Row] = []
    for method in (name for name, one in METHODS.items() if one.degree is not None):
        for target in (round(cut * ahead) for ahead in AHEAD):
            exact_LT = fit_weights(window, Prediction(method, target))
            exact = {name: a_T @ deltas[name] for name, a_T in zip(trajectory.names, exact_LT, strict=True)}
            sketched = _sketched_deltas(trajectory, cut, Prediction(method, target))
            miss_L = torch.tensor([float((sketched[name] - exact[name]).norm()) for name in exact])
            delta_L = torch.tensor([float(exact[name].norm()) for name in exact])
            row: Row = {"size": int(SKETCH[-1]), "rows": len(steps), "method": method, "target": target}
            row["error_of_delta"] = (miss_L.norm() / delta_L.norm()).item()
            row["worst_tensor_error_of_delta"] = (miss_L / delta_L)[delta_L > 0].max().item()
            rows.append(row)
    return rows


def dense_deltas(states: Path, cut: int) -> dict[str, torch.Tensor]:
    """delta_t of the steps up to the cut, (T, n) float64 a tensor; the steps before are not needed."""
    with safe_open(states, framework="pt") as handle:
        found = {}
        for name in handle.keys():  # noqa: SIM118
            rows_Tn = handle.get_slice(name)[: cut + 1].double()
            found[name] = rows_Tn[1:] - rows_Tn[:1]
    return found


def _sketched_deltas(trajectory: Trajectory, cut: int, prediction: Prediction) -> dict[str, torch.Tensor]:
    """theta_hat - theta_0 of each tensor, before rounding to bfloat16."""
    window, histories = replay.window(trajectory, cut), list(replay.histories(trajectory, cut))
    weights_LT = fit_weights(window, prediction)
    shards = weighted_tensors(histories, trajectory.kind, window, weights_LT, torch.float64)
    return {one.name: one.data - history.anchor.double() for one, history in zip(shards, histories, strict=True)}
