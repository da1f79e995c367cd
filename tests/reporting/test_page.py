"""The page of a cut: it says all, needs no network, cannot be made to run what a report holds, and can be used."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from chromium import after, screenshot
from cut_reports import cut_report, predicted, scored
from matplotlib.image import imread
from pictures import check_page, check_png

from relex_verl.maths.advice import Advice
from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.figures import horizon_figure
from relex_verl.reporting.findings import CutReport, EarlierCut, Fits
from relex_verl.reporting.page import write_html

EVIL = "</script><script src='http://example.com/x.js'></script>"
WINNER = Prediction("relex", 24)
ROWS = [scored("observed-step_12", 12, 0.6, None), scored("relex-step_24", 24, 0.7), scored(EVIL, 48, 0.1, "poly")]
LOST = Advice("keep_training", None, "Keep training: relex-step_12 scores 0.1")
NULL = {"explained_variance": 0.81, "line_r2": 0.96}


def tensors(count: int) -> list[dict]:
    """The one in the middle moved furthest; the last never moved."""
    rows = [
        {
            "tensor": f"model.layers.{i}.weight",
            "shape": [i + 1, 6],
            "delta_norm": float(i * (count - i)),
            "line_r2": 0.5,
        }
        for i in range(count)
    ]
    rows[-1] |= {"tensor": f"last{EVIL}", "delta_norm": 0.0, "line_r2": None}
    return rows


def report_of(folder: Path, count: int = 3, won: bool = True) -> CutReport:
    place = folder / "predicted" / WINNER.folder_name
    return cut_report(
        12,
        observed_steps=[2, 4, 6, 8, 10, 12],
        advice=Advice("stop" if won else "keep_training", WINNER if won else None, f"It won: {EVIL}", p_value=0.02),
        recommended_path=str(folder / "it's recommended") if won else None,
        validation_scores=ROWS,
        screened_out={"anchored": f"v1 turned {EVIL}"},
        predictions=[predicted(place, 12, WINNER)],
        earlier_cuts=[EarlierCut(6, LOST, ROWS, {}), EarlierCut(3, LOST, [], {})],
        fits=Fits({"line_r2": {"mean": 0.9, "p10": 0.8, "min": 0.7}}, NULL, tensors(count)),
        steps_saved=76 if won else 0,
        versions={"python": "3.11"},
    )


def page_of(folder: Path, report: CutReport) -> Path:
    figures = (
        {"scores": horizon_figure(folder / "figures", report.validation_scores)} if report.validation_scores else {}
    )
    write_html(folder / "report.html", report, figures)
    return folder / "report.html"


class Elements(HTMLParser):
    """What a page is made of, and what it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.alts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        self.alts += [value or "" for name, value in attrs if tag == "img" and name == "alt"]


def test_it_needs_no_network_and_runs_nothing_of_a_report(tmp_path: Path) -> None:
    path = page_of(tmp_path, report_of(tmp_path))
    page = path.read_text()
    elements = Elements(page)
    assert elements.fetched
    assert all(one.startswith("data:image/png;base64,") for one in elements.fetched)
    assert not {*elements.tags} & {"link", "iframe", "object", "embed", "base", "form"}
    assert elements.tags.count("script") == 1  # its own
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page
    assert all(elements.alts)
    assert check_page(path) == len(elements.alts) == 1
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_a_winner_comes_with_what_to_do(tmp_path: Path) -> None:
    """The answer first, then commands with the paths of this run, quoted for a shell."""
    page = page_of(tmp_path, report_of(tmp_path)).read_text()
    assert page.index("<h1>Stop</h1>") < page.index("data:image/png") < page.index("What to do next")
    assert page.index("What to do next") < page.index("Scores</h2>") < page.index("Tensors</h2>")
    for said in (
        "76 more steps",
        "3</dd>",  # validations
        "vllm serve &#x27;",
        "relex-verl push &#x27;",
        "owner/name",
        "actor_rollout_ref.model.path=",
        f"relex-verl extrapolate {tmp_path / 'predicted' / 'trajectory'} --t-cut 12 --target 24",
        "Earlier cut, at step 6",
        "Methods that were not scored",
        "0.96",
    ):
        assert said in page, said


def test_without_a_winner_it_says_how_to_go_on(tmp_path: Path) -> None:
    page = page_of(tmp_path, report_of(tmp_path, won=False)).read_text()
    assert "<h1>Keep training</h1>" in page
    assert "relex-verl checkout" in page
    assert "relex-verl push" not in page


def test_a_cut_without_scores_fits_or_predictions_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, cut_report(4)).read_text()
    assert "<h1>Unscored</h1>" in page
    assert "What to do next" not in page


@pytest.mark.timeout(280)
def test_it_is_readable_on_a_phone_and_tensors_can_be_sorted(tmp_path: Path) -> None:
    """The pictures stay in pytest's temporary folder."""
    path, profile = page_of(tmp_path, report_of(tmp_path, count=150)), tmp_path / "profile"
    for width in (500, 1200):
        picture = screenshot(path, profile, width)
        check_png(picture)
        assert imread(picture).shape[1] == width
    script = """
      const page = document.documentElement, rows = () => [...document.querySelectorAll("table.sortable tbody tr")];
      const named = row => row.cells[0].textContent, shown = () => rows().filter(row => row.offsetParent !== null).length;
      const button = document.querySelectorAll("table.sortable th button")[2];
      const said = [page.scrollWidth <= page.clientWidth, rows().length, shown()];
      for (const _ of [1, 2]) {
        button.click(); said.push(named(rows()[0]), button.parentElement.getAttribute("aria-sort"));
      }
      document.querySelector("button.show").click(); said.push(shown());
      say(said.join(" "));
    """
    said = after(path, profile, script, width=390).split()
    assert said[:3] == ["true", "150", "100"]  # no wider than the phone; rows, and how many of them are shown
    assert said[3:] == ["model.layers.75.weight", "descending", "model.layers.0.weight", "ascending", "150"]
