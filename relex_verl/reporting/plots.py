"""Figures: plain numbers in, a PNG and an SVG out. No trajectory, no decision, no display.

Every function takes `stem`, the path without its suffix, and a title, and returns the two files it wrote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from relex_verl.reporting.drawing import COLOURS, DOTS, LINE, NULL, label_figure, new_figure, save_figure, styled

__all__ = [
    "CoefficientPanel",
    "Score",
    "Spread",
    "plot_alignment",
    "plot_backtest",
    "plot_coefficients",
    "plot_components",
    "plot_horizon",
    "plot_r2_by_layer",
    "plot_spectrum",
]


@dataclass(frozen=True)
class CoefficientPanel:
    """One tensor of the paper's Figure 4: T real steps, rank-1 coefficients c_t, their line at the steps, its R^2."""

    title: str
    steps: Sequence[float]
    values: Sequence[float]
    line: Sequence[float]
    r2: float | None = None


@dataclass(frozen=True)
class Spread:
    """A middle value and its range at one position of the x axis."""

    x: float
    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """A scored candidate: the step that it predicts, its score, and an interval around it (None: none known)."""

    step: float
    score: float
    low: float | None = None
    high: float | None = None


@styled
def plot_coefficients(stem: Path, panels: Sequence[CoefficientPanel], title: str = "") -> list[Path]:
    """Rank-1 coefficients against the step with their line, a panel a tensor (paper, Figure 4).

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("no tensor to plot")
    columns = min(3, len(panels))
    rows = ceil(len(panels) / columns)
    figure = new_figure(3.2 * columns, 2.4 * rows)
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(all_axes, panels, strict=False):
        axes.plot(panel.steps, panel.values, "o", color=DOTS, markersize=3.5, label="$c_t$", zorder=3)
        axes.plot(panel.steps, panel.line, color=LINE, label="line")
        said = "" if panel.r2 is None or not isfinite(panel.r2) else f"\n$R^2$ = {panel.r2:.3f}"
        axes.set_title(f"{panel.title}{said}")
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    label_figure(figure, "training step", "rank-1 coefficient", title)
    all_axes[0].legend()
    return save_figure(figure, stem)


@styled
def plot_components(
    stem: Path, title: str, steps: Sequence[float], coefficients: Sequence[Sequence[float]], shares: Sequence[float]
) -> list[Path]:
    """Coefficients of one tensor's leading components, each with its share of the variance (paper, Figure 5).

    Args:
        steps: the T real step numbers.
        coefficients: (r, T), largest first.
        shares: (r,) share of the variance of each.
    """
    figure = new_figure(5.5, 3.5)
    axes = figure.subplots()
    for i, (values, share) in enumerate(zip(coefficients, shares, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(steps, values, "o-", color=colour, markersize=3, linewidth=1, label=f"{i + 1}: {share:.1%}")
    axes.axhline(0, color=NULL, linewidth=0.8)
    axes.legend(title="component: variance", fontsize=8)
    label_figure(figure, "training step", "coefficient", title)
    return save_figure(figure, stem)


@styled
def plot_spectrum(
    stem: Path, shares: Sequence[float], null_shares: Sequence[float], title: str = "", spread: Sequence[Spread] = ()
) -> list[Path]:
    """Share of the variance of each singular direction, beside a random walk over the same steps.

    Args:
        shares: (k,) of the trajectory (of one tensor, or the middle over tensors), largest first.
        null_shares: (k,) of the random walk.
        spread: range over the tensors at each component number (x from 1), if there is one.
    """
    figure = new_figure(5, 3.2)
    axes = figure.subplots()
    numbers = range(1, len(shares) + 1)
    if spread:
        x, low, high = [point.x for point in spread], [point.low for point in spread], [point.high for point in spread]
        axes.fill_between(x, low, high, color=DOTS, alpha=0.2, linewidth=0, label="10th-90th percentile")
    axes.plot(numbers, shares, "o-", color=DOTS, markersize=4, label="trajectory")
    axes.plot(range(1, len(null_shares) + 1), null_shares, "s--", color=NULL, markersize=3.5, label="random walk")
    axes.set_yscale("log")
    axes.set_xticks(range(1, len(shares) + 1, max(1, len(shares) // 10)))
    positive = [value for value in (*shares, *null_shares) if value > 0]
    axes.set_ylim(max(1e-6, min(positive, default=1e-6) / 2), 1.5)
    axes.legend()
    label_figure(figure, "component", "share of variance", title)
    return save_figure(figure, stem)


@styled
def plot_r2_by_layer(
    stem: Path, values: Mapping[str, Mapping[int, float]], title: str = "$R^2$ of the line", null: float | None = None
) -> list[Path]:
    """A figure of each tensor by layer and module, as a heat map.

    Args:
        values: module name -> layer number -> value (NaN where it is not defined). Tensors outside the layers (the
            embedding, the last norm) come with layer -1 and stand in a column of their own.
        title: what the values are.
        null: what a random walk would show, for the title.

    Raises:
        ValueError: nothing to plot.
    """
    layers = sorted({layer for by_layer in values.values() for layer in by_layer})
    if not layers:
        raise ValueError("no tensor to plot")
    grid = [[by_layer.get(layer, float("nan")) for layer in layers] for by_layer in values.values()]
    figure = new_figure(max(4.5, 2.6 + 0.24 * len(layers)), max(2.2, 1.1 + 0.24 * len(values)))
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmax=1.0)
    axes.set_yticks(range(len(values)), list(values))
    every = max(1, len(layers) // 16)
    shown = range(0, len(layers), every)
    axes.set_xticks(shown, ["-" if layers[i] < 0 else str(layers[i]) for i in shown])
    figure.colorbar(image, ax=axes)
    beside = "" if null is None or not isfinite(null) else f" (random walk: {null:.3f})"
    label_figure(figure, "layer", "", f"{title}{beside}")
    return save_figure(figure, stem)


@styled
def plot_backtest(
    stem: Path,
    series: Mapping[str, Sequence[Spread]],
    title: str = "",
    xlabel: str = "last observed step of the prefix",
) -> list[Path]:
    """Error of predicting the last observed row from a prefix, against where the prefix ends or how far that is.

    Args:
        series: method -> the error relative to holding the prefix's last checkpoint (median and range over the tensors)
            for each prefix. Below 1 the prediction is nearer to the truth than that checkpoint.
        xlabel: what `x` of the series is.
    """
    figure = new_figure(5.5, 3.5)
    axes = figure.subplots()
    _draw_spreads(axes, series)
    axes.axhline(1.0, color=NULL, linestyle="--", linewidth=1, label="hold the last observed")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    label_figure(figure, xlabel, "error relative to holding", title)
    return save_figure(figure, stem)


@styled
def plot_horizon(
    stem: Path,
    series: Mapping[str, Sequence[Score]],
    baseline: Score | None = None,
    ylabel: str = "validation score",
    title: str = "",
) -> list[Path]:
    """Score of each method's candidates against the step that they predict, with their intervals.

    Args:
        baseline: the last observed checkpoint: what every candidate has to beat.
    """
    figure = new_figure(5.5, 3.5)
    axes = figure.subplots()
    if baseline is not None:
        axes.axhline(baseline.score, color=NULL, linestyle="--", linewidth=1, label=f"observed, step {baseline.step:g}")
        if baseline.low is not None and baseline.high is not None:
            axes.axhspan(baseline.low, baseline.high, color=NULL, alpha=0.15, linewidth=0)
    for i, (method, scores) in enumerate(series.items()):
        ordered = sorted(scores, key=lambda score: score.step)
        steps, values = [score.step for score in ordered], [score.score for score in ordered]
        below = [0.0 if score.low is None else max(0.0, score.score - score.low) for score in ordered]
        above = [0.0 if score.high is None else max(0.0, score.high - score.score) for score in ordered]
        colour = COLOURS[i % len(COLOURS)]
        axes.errorbar(
            steps, values, [below, above], fmt="o-", color=colour, markersize=4, linewidth=1, capsize=2, label=method
        )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    label_figure(figure, "predicted step", ylabel, title)
    return save_figure(figure, stem)


@styled
def plot_alignment(
    stem: Path, cosine: Mapping[str, Sequence[Spread]], ratio: Mapping[str, Sequence[Spread]], title: str = ""
) -> list[Path]:
    """Predictions against true later checkpoints: cosine and norm ratio of their deltas (paper, Figure 6).

    Args:
        cosine: method -> mean cosine over the tensors (and range) at each true step.
        ratio: method -> |predicted delta| / |true delta|, likewise.
    """
    figure = new_figure(8, 3.2)
    both = figure.subplots(1, 2)
    for axes, series, name in zip(both, (cosine, ratio), ("cosine to the true delta", "norm ratio"), strict=True):
        _draw_spreads(axes, series)
        axes.axhline(1.0, color=NULL, linestyle="--", linewidth=1)
        axes.set_title(name)
    both[0].legend(fontsize=8)
    label_figure(figure, "training step", "", title)
    return save_figure(figure, stem)


def _draw_spreads(axes: Any, series: Mapping[str, Sequence[Spread]]) -> None:
    for i, (name, points) in enumerate(series.items()):
        x, colour = [point.x for point in points], COLOURS[i % len(COLOURS)]
        low, high = [point.low for point in points], [point.high for point in points]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, [point.middle for point in points], "o-", color=colour, markersize=4, label=name)
