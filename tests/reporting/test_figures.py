"""The pictures of a window and of the scores: right numbers in them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cut_reports import scored
from pictures import check_png

from relex_verl.maths.diagnostics import backtest_error
from relex_verl.maths.gram import delta_gram
from relex_verl.maths.window import Window
from relex_verl.reporting import figures, plots

STEPS = [2, 4, 6, 8, 10, 12]
NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]


@pytest.fixture(scope="module")
def window() -> Window:
    generator = torch.Generator().manual_seed(0)
    increments = torch.randn(3, 1, 60, generator=generator, dtype=torch.float64)
    increments = increments + 0.3 * torch.randn(3, len(STEPS), 60, generator=generator, dtype=torch.float64)
    return Window(NAMES, STEPS, delta_gram(increments @ increments.transpose(1, 2)))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "mlp.up_proj")),
        ("model.embed_tokens.weight", (-1, "embed_tokens")),
        ("lm_head.weight", (-1, "lm_head")),
    ],
)
def test_a_tensors_place(name: str, place: tuple[int, str]) -> None:
    assert figures.layer_and_module(name) == place


def test_pictures_of_a_window(window: Window, tmp_path: Path) -> None:
    drawn = figures.window_figures(tmp_path / "figures", window, [24], ["relex", "hold"])
    assert drawn.keys() == {"coefficients", "spectrum", "r2_by_layer", "backtest"}
    for path in drawn.values():
        check_png(path)
    one_row = figures.window_figures(tmp_path / "one", window.until(2), [24], ["relex"])
    assert one_row.keys() == {"coefficients", "spectrum"}


def test_the_backtest_is_drawn_against_its_horizon(
    window: Window, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x is how many times the prefix's last step was predicted, the nearest first."""
    seen: dict[str, Any] = {}

    def keep(stem: Path, series: Any, title: str, xlabel: str) -> list[Path]:
        seen.update(points=series["relex"], xlabel=xlabel)
        return [stem.with_suffix(".png")]

    monkeypatch.setattr(plots, "plot_backtest", keep)
    figures.window_figures(tmp_path, window, [24], ["relex"])
    points = seen["points"]
    assert seen["xlabel"] == "horizon: step 12 / last step of the prefix, both from step 0"
    assert [one.x for one in points] == pytest.approx([12 / step for step in reversed(STEPS[1:-1])])
    expected = backtest_error(window, 2, "relex").median().item()
    assert points[-1].middle == pytest.approx(expected)


def test_scores_are_drawn_with_the_spread_over_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the scale of the scores: a reward of -3 has an interval, too."""
    seen: dict[str, Any] = {}

    def keep(stem: Path, series: Any, baseline: Any, title: str) -> list[Path]:
        seen.update(series=series, baseline=baseline)
        return [stem.with_suffix(".svg"), stem.with_suffix(".png")]

    monkeypatch.setattr(plots, "plot_horizon", keep)
    rows = [scored("observed-step_12", 12, -3.0, None, 0.5), scored("relex-step_24", 24, -2.0, "relex", 0.1)]
    assert figures.horizon_figure(tmp_path, rows) == tmp_path / "scores.png"
    assert seen["baseline"] == plots.Score(12, -3.0, pytest.approx(-3.98), pytest.approx(-2.02))
    assert seen["series"] == {"relex": [plots.Score(24, -2.0, pytest.approx(-2.196), pytest.approx(-1.804))]}
