"""The rows of a window: which of them a cut sees, what they say of each other, and Algorithm 1 within them."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from relex_verl.maths.diagnostics import backtest_error, backtest_prefixes, backtest_ratio
from relex_verl.maths.extrapolators import reconstruction_weights
from relex_verl.maths.window import Window
from relex_verl.pipeline.prediction import weighted_tensors
from relex_verl.reporting.plots import Spread
from relex_verl.trajectory import replay
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = ["backtests", "observed_until", "reconstruct", "spread", "window"]


def observed_until(trajectory: Trajectory, cut: int | None) -> list[int]:
    """The observed steps up to a cut, which may lie between two of them but not where more were to be expected.

    Args:
        trajectory: whose steps.
        cut: None for all of them.

    Raises:
        TrajectoryError: nothing was observed up to the cut, or the cut lies a whole gap or more after the last row: what is
            fitted there would not be what its name says.
    """
    steps, everything = trajectory.steps_until(cut), trajectory.steps
    first = everything[0] - trajectory.record.origin_step
    gap = max((late - early for early, late in pairwise(everything)), default=first)
    if cut is not None and cut >= everything[-1] + gap:
        raise TrajectoryError(
            f"--t-cut {cut}: the last observed step is {everything[-1]}; cut there, or record more of the run"
        )
    return steps


def window(trajectory: Trajectory, cut: int | None = None, fit_from: int = 1) -> Window:
    """The rows from step `fit_from` up to a cut.

    Raises:
        TrajectoryError: see `observed_until`; no step is left; a sketch cannot leave out steps that it holds.
    """
    observed_until(trajectory, cut)
    try:
        return replay.window(trajectory, cut).since(fit_from)
    except ValueError as error:
        raise TrajectoryError(f"--fit-from {fit_from}: {error}") from error


def spread(x: float, values: Sequence[float] | torch.Tensor, middle: str = "median") -> Spread | None:
    """Median (or mean) and 10th to 90th percentile over the tensors for which a value is defined; None if none is."""
    values_L = torch.as_tensor(values, dtype=torch.float64)
    values_L = values_L[values_L.isfinite()]
    if not len(values_L):
        return None
    low, median, high = values_L.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Spread(x, values_L.mean().item() if middle == "mean" else median, low, high)


def reconstruct(trajectory: Trajectory, step: int, rank: int, cut: int | None = None) -> Iterator[TensorShard]:
    """Rank-r reconstruction of an observed step: theta_0 + (U_r U_r^T M)_step (paper, Algorithm 1), in the base's types.

    From a sketch: of the row as its polynomial gives it.

    Args:
        trajectory: its steps up to `cut` span the directions.
        step: an observed step.
        rank: r.
        cut: last step that takes part; all of them for None.

    Raises:
        TrajectoryError: the step was not observed, or lies after the cut.
    """
    steps = observed_until(trajectory, cut)
    if step not in steps:
        where = f" of window {trajectory.number}" if len(trajectory.windows) > 1 else ""
        raise TrajectoryError(
            f"--step {step} is not among the {len(steps)} observed steps {steps[0]} to {steps[-1]}{where}"
        )
    rows = replay.window(trajectory, cut)
    weights_LT = reconstruction_weights(rows, step, rank)
    return weighted_tensors(replay.histories(trajectory, cut), trajectory.kind, rows, weights_LT)


def backtests(window: Window, methods: Sequence[str], rank: int = 1) -> list[dict[str, Any]]:
    """Fit on every prefix, predict the last row, compare with holding the prefix's last row; a row a method and prefix.

    Args:
        window: the rows.
        methods: names in METHODS.
        rank: r.

    Returns:
        Keys: method, rows, prefix (its last step), target, error (of the whole model), median, p10, p90 (over tensors).
    """
    rows = []
    for method in methods:
        for prefix in backtest_prefixes(window, method):
            over_tensors = spread(0.0, backtest_error(window, prefix, method, rank))
            if over_tensors is None:
                continue
            row = {"method": method, "rows": prefix, "prefix": window.steps[prefix - 1], "target": window.steps[-1]}
            row["error"] = backtest_ratio(window, prefix, method, rank)
            rows.append({**row, "median": over_tensors.middle, "p10": over_tensors.low, "p90": over_tensors.high})
    return rows
