"""The pictures and the page of a cut: right numbers in them, and a page that needs no network."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_reports import cut_report, scored
from pictures import check_page, check_png

from relex_verl.maths.advice import Advice
from relex_verl.maths.diagnostics import backtest_error
from relex_verl.maths.gram import delta_gram
from relex_verl.maths.window import Window
from relex_verl.reporting import metrics, plots, report
from relex_verl.reporting.findings import EarlierCut

STEPS = [2, 4, 6, 8, 10, 12]
NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
EVIL = "<script src='http://example.com/x.js'></script>"


@pytest.fixture(scope="module")
def window() -> Window:
    generator = torch.Generator().manual_seed(0)
    increments = torch.randn(3, 1, 60, generator=generator, dtype=torch.float64)
    increments = increments + 0.3 * torch.randn(3, len(STEPS), 60, generator=generator, dtype=torch.float64)
    return Window(NAMES, STEPS, delta_gram(increments @ increments.transpose(1, 2)))


ROWS = [
    scored("observed-step_12", 12, 0.6, None),
    scored("relex-step_24", 24, 0.7),
    scored(EVIL, 24, 0.1, "poly"),
]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "mlp.up_proj")),
        ("model.embed_tokens.weight", (-1, "embed_tokens")),
        ("lm_head.weight", (-1, "lm_head")),
    ],
)
def test_a_tensors_place(name: str, place: tuple[int, str]) -> None:
    assert report.layer_and_module(name) == place


def test_pictures_of_a_window(window: Window, tmp_path: Path) -> None:
    drawn = report.window_figures(tmp_path / "figures", window, [24], ["relex", "hold"])
    assert drawn.keys() == {"coefficients", "spectrum", "r2_by_layer", "backtest"}
    for path in drawn.values():
        check_png(path)
    one_row = report.window_figures(tmp_path / "one", window.until(2), [24], ["relex"])
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
    report.window_figures(tmp_path, window, [24], ["relex"])
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
    assert report.horizon_figure(tmp_path, rows) == tmp_path / "scores.png"
    assert seen["baseline"] == plots.Score(12, -3.0, pytest.approx(-3.98), pytest.approx(-2.02))
    assert seen["series"] == {"relex": [plots.Score(24, -2.0, pytest.approx(-2.196), pytest.approx(-1.804))]}


class References(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")
        ]


def test_the_page_needs_no_network_and_says_it_all(window: Window, tmp_path: Path) -> None:
    fits = metrics.fit_report(window, [[6, 10]] * 3, 1)
    figures = report.window_figures(tmp_path / "figures", window, [24], ["relex"])
    figures["scores"] = report.horizon_figure(tmp_path / "figures", ROWS)
    lost = Advice("keep_training", None, "Keep training: relex-step_12 scores 0.1")
    content = cut_report(
        12,
        observed_steps=STEPS,
        advice=Advice("keep_training", None, f"Keep training: {EVIL}"),
        validation_scores=ROWS,
        screened_out={"poly": f"v1 turned {EVIL}"},
        earlier_cuts=[EarlierCut(6, lost, ROWS, {}), EarlierCut(6, lost, [], {})],
        fits=fits,
    )
    path = tmp_path / "report.html"
    report.write_html(path, content, figures)
    page = path.read_text()
    references = References()
    references.feed(page)
    assert references.found
    assert all(one.startswith("data:image/png;base64,") for one in references.found)
    assert not references.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"url\(|@import", page)
    assert check_page(path) == page.count("data:image/png") == len(figures) == 5
    for said in ("keep training", "relex-step_24", "0.02", "Screened out", "Earlier cut, at step 6", *NAMES):
        assert said in page
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []
