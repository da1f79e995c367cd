"""The figures of RESULTS.md: means over seeds, with a band from the smallest to the largest."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from relex_verl.maths.extrapolators import METHODS
from study.grid import Grid

LINES = {
    ("hold", "fp32"): ("last observed", "0.5", ":"),
    ("relex", "bf16"): ("relex, bf16", "tab:red", "-"),
    ("relex", "fp32"): ("relex, fp32", "tab:blue", "-"),
    ("anchored", "bf16"): ("anchored, bf16", "tab:orange", "--"),
    ("anchored", "fp32"): ("anchored, fp32", "tab:green", "--"),
}
DPI = 80


def band(axes: Axes, rows: pd.DataFrame, column: str, label: str, colour: str, style: str) -> None:
    """One line with its spread over seeds."""
    by_target = rows.groupby("target")[column]
    mean, low, high = by_target.mean(), by_target.min(), by_target.max()
    axes.plot(mean.index, mean, style, color=colour, label=label, marker=".")
    axes.fill_between(mean.index, low, high, color=colour, alpha=0.12, linewidth=0)


def panels(grid: Grid, path: Path, label: str, draw: Callable[[Axes, int, float], None]) -> None:
    """A figure with a row for each prefix and a column for each learning rate."""
    rates = grid.learning_rates
    size = (4.2 * len(rates), 3.2 * len(grid.cuts))
    figure, grid_of_axes = plt.subplots(len(grid.cuts), len(rates), figsize=size, squeeze=False, sharey=True)
    for cut, row in zip(grid.cuts, grid_of_axes, strict=True):
        for rate, axes in zip(rates, row, strict=True):
            draw(axes, cut, rate)
            axes.set_xscale("log")
            ticks = [cut, *grid.targets[cut]]
            axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
            axes.minorticks_off()
            axes.set_title(f"learning rate {rate:g}, prefix of {cut} steps", fontsize=9)
            axes.axvline(grid.steps, color="0.8", linewidth=0.8, zorder=0)
            axes.set_xlabel("target step")
        row[0].set_ylabel(label)
    grid_of_axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def chosen(predictions: pd.DataFrame, cut: int, rate: float) -> pd.DataFrame:
    """Predictions of one panel."""
    return predictions[(predictions.cut == cut) & (predictions.learning_rate == rate)]


def accuracy_figure(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame, path: Path) -> None:
    """Trajectories compared, with the real run and the control."""

    def draw(axes: Axes, cut: int, rate: float) -> None:
        own = runs[runs.learning_rate == rate]
        real = own[(own.kind == "run") & (own.step >= cut)].rename(columns={"step": "target"})
        band(axes, real, "accuracy", "the real run", "black", "-")
        panel = chosen(predictions, cut, rate)
        for (method, arm), (label, colour, style) in LINES.items():
            band(axes, panel[(panel.method == method) & (panel.trajectory == arm)], "accuracy", label, colour, style)
        control = own[(own.kind == "control") & (own.step == cut)].accuracy
        axes.plot([grid.steps] * len(control), control, "*", color="tab:purple", label="control: rate x horizon")

    panels(grid, path, "greedy accuracy", draw)


def methods_figure(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame, path: Path) -> None:
    """All methods, from the fp32 trajectory."""

    def draw(axes: Axes, cut: int, rate: float) -> None:
        panel = chosen(predictions, cut, rate)
        for number, method in enumerate(METHODS):
            rows = panel[(panel.method == method) & (panel.trajectory == "fp32")]
            band(axes, rows, "accuracy", method, f"C{number}", "-")

    panels(grid, path, "greedy accuracy", draw)


def cosine_figure(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame, path: Path) -> None:
    """Mean over tensors of the cosine to the true later delta."""

    def draw(axes: Axes, cut: int, rate: float) -> None:
        panel = chosen(predictions, cut, rate).dropna(subset=["cosine"])
        for (method, arm), (label, colour, style) in LINES.items():
            band(axes, panel[(panel.method == method) & (panel.trajectory == arm)], "cosine", label, colour, style)

    panels(grid, path, "cosine to the true delta", draw)


FIGURES = {"accuracy": accuracy_figure, "methods": methods_figure, "cosine": cosine_figure}
