"""Figures of a window -> flat metrics of a step, rows and summary of a cut."""

import math
from collections.abc import Mapping, Sequence

import torch

from relex_verl.maths.diagnostics import describe, random_walk, summary
from relex_verl.maths.window import Window
from relex_verl.reporting.findings import Fits

__all__ = ["fit_report", "row_metrics", "step_metrics"]


def row_metrics(changed_share: float, stored_bytes: int) -> dict[str, float]:
    """What there is to say of a row by itself, see `step_metrics`."""
    metrics = {"relex/stored_bytes": float(stored_bytes)}
    if math.isfinite(changed_share):  # a sketch does not keep the row before
        metrics["relex/changed_share"] = changed_share
    return metrics


def step_metrics(
    figures: Mapping[str, torch.Tensor], changed_share: float, stored_bytes: int, backtest: float
) -> dict[str, float]:
    """The metrics of one observed step: `relex/<figure>/<mean, p10 or min>` over the tensors, totals, and live signals.

    Args:
        figures: name -> one value a tensor, as `diagnostics.describe` gives them.
        changed_share: share of the weights whose bits changed.
        stored_bytes: size of the trajectory so far.
        backtest: from `diagnostics.half_backtest`; `relex/ready` is 1 when it says that extrapolating beats holding.
    """
    metrics = row_metrics(changed_share, stored_bytes)
    if math.isfinite(backtest):
        metrics |= {"relex/backtest/error_vs_hold": backtest, "relex/ready": float(backtest < 1.0)}
    if figures["drift"].isfinite().any():
        metrics["relex/drift"] = figures["drift"].nanmean().item()
    for name, values_L in figures.items():
        metrics |= {f"relex/{name}/{statistic}": value for statistic, value in summary(values_L).items()}
    return metrics


def fit_report(window: Window, shapes: Sequence[Sequence[int]], rank: int) -> Fits:
    """The fits of a cut: a row for each tensor, their summary, and the random-walk null beside it.

    A tensor that never moved has null figures, not zeros; so has every tensor where only a sketch is known.

    Args:
        window: the rows that take part in the fit.
        shapes: of its tensors.
        rank: directions counted in the explained variance.
    """
    figures, null = describe(window, rank), describe(random_walk(window), rank)
    norms_L = window.gram_LTT[:, -1, -1].clamp_min(0.0).sqrt().tolist()
    columns = {name: values_L.tolist() for name, values_L in figures.items()}
    rows = [
        {
            "tensor": name,
            "shape": list(shape),
            "delta_norm": norms_L[i],
            **{column: _defined(values[i]) for column, values in columns.items()},
        }
        for i, (name, shape) in enumerate(zip(window.names, shapes, strict=True))
    ]
    return Fits(
        summary={name: summary(values_L) for name, values_L in figures.items()},
        random_walk_null={name: values_1.item() for name, values_1 in null.items()},
        tensors=rows,
    )


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
