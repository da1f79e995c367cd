"""The figures of the analysis commands, from numbers that the commands print as well."""

from collections.abc import Sequence
from pathlib import Path

from relex_verl.maths.diagnostics import describe, random_walk, spectrum
from relex_verl.maths.window import Window
from relex_verl.offline.analysis import Alignment, spread
from relex_verl.reporting import figures as pictures
from relex_verl.reporting import plots

__all__ = ["alignment_figure", "backtest_figure", "diagnosis_figures"]

COMPONENTS = 5  # of the paper's Figure 5


def diagnosis_figures(out: Path, window: Window, targets: Sequence[int], chosen: Sequence[str]) -> dict[str, Path]:
    """Figures 4 and 5 of the paper and what stands beside them; name -> PNG file.

    Args:
        out: folder of the files.
        window: the rows.
        targets: steps to which the lines are drawn on.
        chosen: tensors whose coefficients and components are drawn; those that moved most for none.
    """
    figures = pictures.window_figures(out, window, targets, ["relex"])
    positions = [list(window.names).index(name) for name in chosen]
    if chosen:
        panels = [pictures.coefficient_panel(window, i, targets) for i in positions]
        figures["coefficients"] = plots.plot_coefficients(out / "coefficients", panels, "Rank-1 coefficients")[0]
    moved_L = window.gram_LTT[:, -1, -1]
    if not moved_L.any():
        return figures
    if not window.smoothed:  # a sketch of r moments has r components, whatever the rows had
        for i in positions or [int(moved_L.argmax())]:
            figure = f"components_{window.names[i]}" if chosen else "components"
            figures[figure] = _components(out / figure, window, i)
    by_module: dict[str, dict[int, float]] = {}
    for name, share in zip(window.names, describe(window)["explained_variance"].tolist(), strict=True):
        layer, module = pictures.layer_and_module(name)
        by_module.setdefault(module, {})[layer] = share
    null = describe(random_walk(window))["explained_variance"].item()
    stem = out / "explained_variance_by_layer"
    figures[stem.name] = plots.plot_r2_by_layer(stem, by_module, "explained variance", null)[0]
    return figures


def _components(stem: Path, window: Window, tensor: int) -> Path:
    """Figure 5: the leading components of one tensor, signed so that each ends above 0."""
    of = spectrum(window.gram_LTT[tensor : tensor + 1])
    count = min(COMPONENTS, window.rows)
    values_r = of.values_LT[0, :count]
    vectors_Tr = of.vectors_LTT[0, :, :count]
    drawn_rT = (vectors_Tr * vectors_Tr[-1].sign() * values_r.sqrt()).T
    shares, title = (values_r / values_r.sum()).tolist(), f"{window.names[tensor]}: variance within rank {count}"
    return plots.plot_components(stem, title, window.steps, drawn_rT.tolist(), shares)[0]


def alignment_figure(out: Path, aligned: Sequence[Alignment], title: str) -> list[Path]:
    """Figure 6 of the paper: mean cosine and norm ratio over the tensors."""
    cosine: dict[str, list[plots.Spread]] = {}
    ratio: dict[str, list[plots.Spread]] = {}
    for alignment in aligned:
        for series, values in ((cosine, alignment.cosine), (ratio, alignment.ratio)):
            point = spread(alignment.step, values, "mean")
            if point is not None:
                series.setdefault(alignment.method, []).append(point)
    return plots.plot_alignment(out / "alignment", cosine, ratio, title)


def backtest_figure(out: Path, rows: Sequence[dict], target: int) -> list[Path]:
    """Error against the prefix, of each method."""
    series: dict[str, list[plots.Spread]] = {}
    for row in rows:
        point = plots.Spread(row["prefix"], row["median"], row["p10"], row["p90"])
        series.setdefault(row["method"], []).append(point)
    return plots.plot_backtest(out / "backtest", series, f"predicting step {target}")
