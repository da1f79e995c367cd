"""Pictures of a window and of the scores: figures computed from G, drawn by `plots`."""

import re
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import torch

from relex_verl.maths.diagnostics import (
    backtest_error,
    backtest_prefixes,
    coefficients,
    explained_variance,
    line_r2,
    random_walk,
    spectrum,
)
from relex_verl.maths.extrapolators import line_hat
from relex_verl.maths.window import Window
from relex_verl.reporting import plots
from relex_verl.reporting.findings import Scored

__all__ = ["coefficient_panel", "horizon_figure", "layer_and_module", "window_figures"]

PANELS = 6
COMPONENTS = 10


def layer_and_module(name: str) -> tuple[int, str]:
    """Layer number (-1 outside the layers) and module of a tensor: model.layers.3.mlp.up_proj.weight -> 3, mlp.up_proj."""
    layer = re.search(r"\.(\d+)\.", name)
    module = name.removesuffix(".weight")
    return (int(layer.group(1)), module[layer.end() :]) if layer else (-1, module.removeprefix("model."))


def window_figures(folder: Path, window: Window, targets: Sequence[int], methods: Sequence[str]) -> dict[str, Path]:
    """Draw what the window looks like (paper, Figure 4 and beyond); PNG beside SVG.

    Args:
        folder: where the files go.
        window: the rows that take part in the fit. Of a sketch only the coefficients are drawn, as what they are.
        targets: steps to which the lines are drawn on.
        methods: whose backtest is drawn.

    Returns:
        Name of the figure -> PNG file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    of, null = spectrum(window.gram_LTT), spectrum(random_walk(window).gram_LTT)
    drawn = {
        "coefficients": plots.plot_coefficients(
            folder / "coefficients",
            _panels(window, targets),
            "Rank-1 coefficients, smoothed by the sketch" if window.smoothed else "Rank-1 coefficients, extrapolated",
        ),
    }
    if not window.smoothed:
        drawn["spectrum"] = _spectrum_figure(folder, of, null)
    if window.rows >= 3 and not window.smoothed:
        values: dict[str, dict[int, float]] = {}
        for name, value in zip(window.names, line_r2(of, window.steps).tolist(), strict=True):
            layer, module = layer_and_module(name)
            values.setdefault(module, {})[layer] = value
        walk = line_r2(null, window.steps).item()
        drawn["r2_by_layer"] = plots.plot_r2_by_layer(folder / "r2_by_layer", values, null=walk)
    series = {method: _backtests(window, method) for method in methods if method != "hold"}
    series = {method: spreads for method, spreads in series.items() if spreads}
    if series:
        title = f"Predicting step {window.steps[-1]} from a prefix"
        horizon = f"horizon: step {window.steps[-1]} / last step of the prefix, both from step {window.origin_step}"
        drawn["backtest"] = plots.plot_backtest(folder / "backtest", series, title, horizon)
    return {name: next(path for path in paths if path.suffix == ".png") for name, paths in drawn.items()}


def coefficient_panel(window: Window, tensor: int, targets: Sequence[int]) -> plots.CoefficientPanel:
    """One tensor of the paper's Figure 4: its rank-1 coefficients, and their line on to the targets.

    Args:
        window: the rows. Those of a sketch say nothing of how straight the real ones are: no R^2.
        tensor: its position in the stack.
        targets: steps to which the line is drawn on.
    """
    of, reach = spectrum(window.gram_LTT[tensor : tensor + 1]), [*window.steps, *targets]
    name, observed_T = window.names[tensor], coefficients(of)[0]
    values = observed_T.tolist() + [nan] * len(targets)  # points end where the line goes on
    if window.rows < 2:
        return plots.CoefficientPanel(name, reach, values, values)
    line = (torch.stack([line_hat(window.steps, step) for step in reach]) @ observed_T).tolist()
    r2 = None if window.smoothed else line_r2(of, window.steps).item()
    return plots.CoefficientPanel(name, reach, values, line, r2)


def horizon_figure(folder: Path, rows: Sequence[Scored]) -> Path:
    """Score against horizon, with 95 % intervals (normal) from the spread of the scores over the prompts.

    Args:
        folder: where the files go.
        rows: of a report: of the last observed weights first, then of the predictions.
    """

    def point(row: Scored) -> plots.Score:
        half = 1.96 * row.standard_error
        return plots.Score(row.target, row.score, row.score - half, row.score + half)

    hold, *predicted = rows
    series: dict[str, list[plots.Score]] = {}
    for row in predicted:
        series.setdefault(str(row.method), []).append(point(row))
    paths = plots.plot_horizon(folder / "scores", series, point(hold), title="Validation score of the predictions")
    return next(path for path in paths if path.suffix == ".png")


def _panels(window: Window, targets: Sequence[int]) -> list[plots.CoefficientPanel]:
    """The tensors that moved most, one a module; the first tensor where none moved."""
    chosen: dict[str, int] = {}
    moved_L = window.gram_LTT[:, -1, -1]
    for i in moved_L.argsort(descending=True).tolist():
        if moved_L[i] > 0:
            chosen.setdefault(layer_and_module(window.names[i])[1], i)
    return [coefficient_panel(window, i, targets) for i in list(chosen.values())[:PANELS] or [0]]


def _spectrum_figure(folder: Path, of: Any, null: Any) -> list[Path]:
    shares_LT = of.values_LT / of.values_LT.sum(-1, keepdim=True)
    shares_LT = shares_LT[shares_LT.isfinite().all(-1)][:, :COMPONENTS]
    if not len(shares_LT):
        shares_LT = torch.zeros(1, min(COMPONENTS, of.values_LT.shape[-1]), dtype=torch.float64)
    middle = shares_LT.quantile(0.5, dim=0).tolist()
    low, high = shares_LT.quantile(0.1, dim=0).tolist(), shares_LT.quantile(0.9, dim=0).tolist()
    spread = [plots.Spread(i + 1, middle[i], low[i], high[i]) for i in range(len(middle))]
    walk = (null.values_LT / null.values_LT.sum())[0, :COMPONENTS].tolist()
    share = float(explained_variance(of).nanmedian())
    return plots.plot_spectrum(folder / "spectrum", middle, walk, f"Rank 1 holds {share:.0%} of the variance", spread)


def _backtests(window: Window, method: str) -> list[plots.Spread]:
    """Spread of the backtest's error over the tensors at each horizon s_T / s_prefix, the nearest first."""
    spreads, reach = [], window.distances
    for prefix in reversed(backtest_prefixes(window, method)):
        errors_L = backtest_error(window, prefix, method)
        errors_L = errors_L[errors_L.isfinite()]
        if len(errors_L):
            low, middle, high = errors_L.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
            spreads.append(plots.Spread(reach[-1] / reach[prefix - 1], middle, low, high))
    return spreads
