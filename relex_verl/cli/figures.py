"""The figures of the analysis commands, from numbers that the commands print as well."""

from collections.abc import Sequence
from pathlib import Path

import torch

from relex_verl.maths.diagnostics import describe, random_walk_gram, spectrum
from relex_verl.offline.analysis import Alignment, Window, spread
from relex_verl.reporting import plots, report

__all__ = ["alignment_figure", "backtest_figure", "diagnosis_figures"]

COMPONENTS = 5  # of the paper's Figure 5


def diagnosis_figures(
    out: Path, names: Sequence[str], window: Window, targets: Sequence[int], chosen: Sequence[str]
) -> dict[str, Path]:
    """Figures 4 and 5 of the paper and what stands beside them; name -> PNG file.

    Args:
        out: folder of the files.
        names: of the tensors, in the order of the stack.
        window: the rows.
        targets: steps to which the lines are drawn on.
        chosen: tensors whose coefficients and components are drawn; those that moved most for none.
    """
    steps, gram_LTT, energy_L = window
    smoothed = energy_L is not None
    figures = report.window_figures(out, names, gram_LTT, steps, targets, ["relex"], smoothed)
    if chosen:
        panels = [
            report.coefficient_panel(name, gram_LTT[names.index(name)], steps, targets, smoothed) for name in chosen
        ]
        figures["coefficients"] = plots.plot_coefficients(out / "coefficients", panels, "Rank-1 coefficients")[0]
    if not gram_LTT[:, -1, -1].any():
        return figures
    if not smoothed:  # a sketch of r moments has r components, whatever the rows had
        for name in chosen or [names[int(gram_LTT[:, -1, -1].argmax())]]:
            figure = f"components_{name}" if chosen else "components"
            figures[figure] = _components(out / figure, name, gram_LTT[names.index(name)], steps)
    by_module: dict[str, dict[int, float]] = {}
    shares = describe(gram_LTT, steps, energy_L=energy_L)["explained_variance"].tolist()
    for name, share in zip(names, shares, strict=True):
        layer, module = report.layer_and_module(name)
        by_module.setdefault(module, {})[layer] = share
    null = describe(random_walk_gram(steps), steps)["explained_variance"].item()
    stem = out / "explained_variance_by_layer"
    figures[stem.name] = plots.plot_r2_by_layer(stem, by_module, "explained variance", null)[0]
    return figures


def _components(stem: Path, name: str, gram_TT: torch.Tensor, steps: Sequence[int]) -> Path:
    """Figure 5: the leading components of one tensor, signed so that each ends above 0."""
    of = spectrum(gram_TT.unsqueeze(0))
    count = min(COMPONENTS, len(steps))
    values_r = of.values_LT[0, :count]
    vectors_Tr = of.vectors_LTT[0, :, :count]
    drawn_rT = (vectors_Tr * vectors_Tr[-1].sign() * values_r.sqrt()).T
    shares = (values_r / values_r.sum()).tolist()
    return plots.plot_components(stem, f"{name}: variance within rank {count}", steps, drawn_rT.tolist(), shares)[0]


def alignment_figure(out: Path, aligned: Sequence[Alignment], title: str) -> list[Path]:
    """Figure 6 of the paper: mean cosine and norm ratio over the tensors."""
    cosine: dict[str, list[plots.Spread]] = {}
    ratio: dict[str, list[plots.Spread]] = {}
    for one in aligned:
        for series, values in ((cosine, one.cosine), (ratio, one.ratio)):
            point = spread(one.step, values, "mean")
            if point is not None:
                series.setdefault(one.method, []).append(point)
    return plots.plot_alignment(out / "alignment", cosine, ratio, title)


def backtest_figure(out: Path, rows: Sequence[dict], target: int) -> list[Path]:
    """Error against the prefix, of each method."""
    series: dict[str, list[plots.Spread]] = {}
    for row in rows:
        point = plots.Spread(row["prefix"], row["median"], row["p10"], row["p90"])
        series.setdefault(row["method"], []).append(point)
    return plots.plot_backtest(out / "backtest", series, f"predicting step {target}")
