"""Figures: files that are what their suffix says, with the numbers' words in them, from any sensible input."""

import subprocess
import sys
from xml.etree import ElementTree

import pytest
from pictures import check_png

from relex_verl.reporting import plots

STEPS = [1, 2, 4, 8]


def draw(name, stem):
    spreads = [plots.Spread(step, 0.5, 0.2, 0.9) for step in STEPS]
    if name == "coefficients":
        panels = [
            plots.CoefficientPanel(f"layer {i}", STEPS, [1, 2, 4, 9], [1, 2, 4, 8], r2)
            for i, r2 in enumerate([0.9, None, float("nan"), 1.0])
        ]
        return plots.plot_coefficients(stem, panels, "four tensors")
    if name == "components":
        return plots.plot_components(stem, "layer 14", STEPS, [[1, 2, 4, 8], [0, 1, -1, 0]], [0.8, 0.2])
    if name == "spectrum":
        return plots.plot_spectrum(stem, [0.9, 0.1, 0.0], [0.8, 0.15, 0.05], "spectrum", spreads[:3])
    if name == "r2":
        values = {"q_proj": {0: 0.9, 1: 0.8}, "embed_tokens": {-1: 0.7}, "norm": {-1: float("nan")}}
        return plots.plot_r2_by_layer(stem, values, null=0.96)
    if name == "backtest":
        return plots.plot_backtest(stem, {"relex": spreads, "anchored": spreads}, "backtest")
    if name == "horizon":
        scores = {"relex": [plots.Score(200, 0.6, 0.5, 0.7), plots.Score(100, 0.5)], "hold": []}
        return plots.plot_horizon(stem, scores, plots.Score(75, 0.55, 0.5, 0.6), "accuracy")
    return plots.plot_alignment(stem, {"relex": spreads}, {"relex": spreads}, "alignment")


FIGURES = ["coefficients", "components", "spectrum", "r2", "backtest", "horizon", "alignment"]


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_a_png_and_an_svg(name, tmp_path):
    png, svg = draw(name, tmp_path / "deep" / f"{name}.v1")
    assert (png.name, svg.name) == (f"{name}.v1.png", f"{name}.v1.svg")
    check_png(png)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_the_same_numbers_give_the_same_file(tmp_path):
    for first, second in zip(draw("backtest", tmp_path / "a"), draw("backtest", tmp_path / "b"), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="no tensor"):
        plots.plot_coefficients(tmp_path / "a", [])
    with pytest.raises(ValueError, match="no tensor"):
        plots.plot_r2_by_layer(tmp_path / "a", {})
    assert list(tmp_path.iterdir()) == []


def test_a_horizon_without_any_score_is_still_a_figure(tmp_path):
    assert len(plots.plot_horizon(tmp_path / "a", {})) == 2


def test_importing_draws_in_no_library():
    code = (
        "import sys, relex_verl.reporting.plots; assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
