"""The page of a cut: it says it all, and needs no network."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_reports import NO_FITS, cut_report, predicted, scored
from pictures import check_page

from relex_verl.maths.advice import Advice, unscored
from relex_verl.maths.extrapolators import Prediction
from relex_verl.maths.gram import delta_gram
from relex_verl.maths.window import Window
from relex_verl.reporting import figures, metrics, page
from relex_verl.reporting.findings import EarlierCut

STEPS = [2, 4, 6, 8, 10, 12]
NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
EVIL = "<script src='http://example.com/x.js'></script>"
ROWS = [
    scored("observed-step_12", 12, 0.6, None),
    scored("relex-step_24", 24, 0.7),
    scored(EVIL, 24, 0.1, "poly"),
]


class References(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.alts += [value or "" for name, value in attrs if name == "alt"]
        self.found += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")
        ]


def test_the_page_needs_no_network_and_says_it_all(tmp_path: Path) -> None:
    increments = torch.randn(3, len(STEPS), 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    window = Window(NAMES, STEPS, delta_gram(increments @ increments.transpose(1, 2)))
    fits = metrics.fit_report(window, [[6, 10]] * 3, 1)
    drawn = figures.window_figures(tmp_path / "figures", window, [24], ["relex"])
    drawn["scores"] = figures.horizon_figure(tmp_path / "figures", ROWS)
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
    page.write_html(path, content, drawn)
    text = path.read_text()
    references = References()
    references.feed(text)
    assert references.found
    assert all(one.startswith("data:image/png;base64,") for one in references.found)
    assert not references.tags & {"link", "iframe", "object", "embed", "base"}
    assert "default-src 'none'" in text
    assert all(references.alts)
    assert len(references.alts) == len(drawn)
    assert text.count("<script") == 1  # our own; every other text is only text
    assert not re.search(r"url\(|@import", text)
    assert check_page(path) == text.count("data:image/png") == len(drawn) == 5
    for said in ("Keep training", "relex-step_24", "0.661 to 0.739", "Screened out", "Step 6: keep training", *NAMES):
        assert said in text
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def written(folder: Path, *content: Any, **more: Any) -> str:
    """The page of a report, as text."""
    page.write_html(folder / "report.html", cut_report(*content, **more), {})
    return (folder / "report.html").read_text()


WINNER = Prediction("relex", 24)
STOP = Advice("stop", WINNER, "Stop: relex-step_24 scores 0.7", 0.7, 0.6, 200, 0.02, 0.05)
KEEP = Advice("keep_training", None, "Keep training: relex-step_24 scores 0.6", 0.6, 0.6, 200, 0.4, 0.05)


@pytest.mark.parametrize(
    ("advice", "more", "says"),
    [
        (STOP, {"steps_saved": 1088}, ["Stop</h1>", ">relex-step_24 scores 0.7.<", "1,088 training steps", "p = 0.02"]),
        (STOP, {}, ["Stop</h1>", "0 training steps", "the run is at its end"]),
        (STOP, {"steps_saved": -3}, ["-3 training steps", "took more than the rest"]),
        (KEEP, {"next_cut": 30}, ["Keep training</h1>", "step 30<", "18 training steps from here"]),
        (KEEP, {}, ["Keep training</h1>", "the run ends before another one"]),
        (unscored("no validation"), {}, ["Unscored</h1>", ">no validation. Score the", "nothing was scored"]),
        (Advice("jump<b>", None, "As it is."), {}, ["jump&lt;b&gt;</h1>", ">As it is.<"]),
    ],
)
def test_the_answer_stands_first(advice: Advice, more: dict[str, Any], says: list[str], tmp_path: Path) -> None:
    text = written(tmp_path, 12, advice=advice, **more)
    answer = text[text.index("<main>") : text.index("</dl>")]
    assert [said for said in says if said not in answer] == []


def test_what_the_scoring_cost(tmp_path: Path) -> None:
    for seconds, said in ((40.0, "2 min"), (10.0, "30 s"), (3600.0, "3.0 h")):
        rows = [scored(f"relex-step_{step}", step, 0.5, seconds=seconds) for step in (12, 24, 48)]
        text = written(tmp_path, 12, validation_scores=rows)
        assert f"{said}<small>3 validations" in text


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    text = written(tmp_path, 12, fits=NO_FITS, observed_steps=[])
    for absent in ("What to do next", "<h2>Scores", "Screened out", "How it moved", "Earlier cuts", "Tensor by", "nan"):
        assert absent not in text


def test_the_winner_is_marked_among_the_scores_in_their_order(tmp_path: Path) -> None:
    rows = [ROWS[0], scored("relex-step_48", 48, 0.5), ROWS[1]]
    path = tmp_path / "predicted" / "relex-step_24"
    more = {"recommended_path": str(tmp_path / "recommended"), "predictions": [predicted(path, 12, WINNER)]}
    text = written(tmp_path, 12, advice=STOP, validation_scores=rows, **more)
    assert re.findall(r"<tr( class=\"winner\")?><td>([\w-]+)", text) == [
        ("", "observed-step_12"),
        (' class="winner"', "relex-step_24"),
        ("", "relex-step_48"),
    ]
    assert text.index("vllm serve") < text.index("<h2>Scores")
