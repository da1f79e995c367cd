"""The page in headless Chromium, on a phone and on a desk. The screenshots stay in the folder of the test run."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from chromium import after, screenshot
from cut_reports import cut_report, predicted, scored
from matplotlib.image import imread
from pictures import check_png

from relex_verl.maths.advice import Advice
from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.figures import horizon_figure
from relex_verl.reporting.findings import Fits
from relex_verl.reporting.page import write_html

pytestmark = pytest.mark.timeout(280)
PHONE, DESK = 390, 1200
EVIL = "</script><img src=x onerror=\"document.body.dataset.evil='yes'\">"
ROWS = [scored("observed-step_12", 12, 0.6, None), scored("relex-step_24", 24, 0.7), scored("relex-step_48", 48, 0.5)]
# Runs behind the page's own script, and leaves what it saw in the document.
PROBE = """
const seen = {};
const table = document.querySelector("table.sortable");
const names = () => Array.from(table.tBodies[0].rows, (row) => row.cells[0].textContent);
const shown = () => Array.from(table.tBodies[0].rows).filter((row) => row.offsetParent !== null).length;
const headers = Array.from(table.tHead.rows[0].cells);
const header = (title) => headers.find((cell) => cell.textContent === title);
const sorted = (title) => {
  const button = header(title).querySelector("button");
  button.focus();
  seen.focused = document.activeElement === button;
  button.click();
  return { first: names().slice(0, 4), last: names().at(-1), order: headers.map((cell) => cell.ariaSort) };
};
seen.folded = !table.closest("details").open;
document.querySelectorAll("details").forEach((details) => (details.open = true));
seen.width = innerWidth;
seen.overflow = document.documentElement.scrollWidth - innerWidth;
seen.copies = document.querySelectorAll(".next button.copy").length;
seen.commands = document.querySelectorAll(".next pre").length;
seen.evil = document.body.dataset.evil ?? "no";
seen.between = table.tBodies[0].childNodes.length - table.tBodies[0].rows.length;
seen.shown = shown();
seen.up = sorted("R² of the line");
seen.down = sorted("R² of the line");
seen.shapes = sorted("Shape");
seen.names = sorted("Tensor");
document.querySelector("button.all")?.click();
seen.shown_all = shown();
say(JSON.stringify(seen));
"""


def tensor(name: str, r2: float | None, shape: list[int]) -> dict[str, Any]:
    return {"tensor": name, "shape": shape, "delta_norm": 1.5, "line_r2": r2}


def page(folder: Path, tensors: list[dict[str, Any]]) -> Path:
    """A report with long and hostile names in every place."""
    winner, run = Prediction("relex", 24), folder / ("a_long_name_" * 8)
    content = cut_report(
        12,
        advice=Advice("stop", winner, f"Stop: {EVIL} {'x' * 300}", 0.7, 0.6, 200, 0.02, 0.05),
        recommended_path=str(run / "recommended"),
        validation_scores=ROWS,
        screened_out={EVIL: "y" * 300},
        predictions=[predicted(run / "predicted" / "relex-step_24", 12, winner)],
        fits=Fits({"line_r2": {"mean": 0.9, "p10": 0.8, "min": 0.1}}, {"line_r2": 0.96}, tensors),
        versions={"z" * 300: "1"},
    )
    path = folder / "report.html"
    write_html(path, content, {"scores": horizon_figure(folder, ROWS), "z" * 100: folder / "scores.png"})
    return path


def seen(path: Path, width: int) -> dict[str, Any]:
    """What the probe saw in the page."""
    result: dict[str, Any] = json.loads(html.unescape(after(path, path.with_name("profile"), PROBE, width)))
    return result


FEW = [
    tensor("layers.10.up", 0.99951, [8, 4]),
    tensor("layers.9.up", 0.99949, [100]),
    tensor("layers.2.norm", None, [9, 1000]),
    tensor(EVIL + "w" * 300, -3.0, [7]),
]


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_fits_the_screen_and_its_tensors_are_sorted_by_a_click(tmp_path: Path, width: int) -> None:
    path = page(tmp_path, FEW)
    found = seen(path, width)
    assert (found["width"], found["overflow"]) == (width, 0)
    assert (found["folded"], found["focused"], found["evil"]) == (True, True, "no")
    assert found["copies"] == found["commands"] == 6
    assert found["shown"] == found["shown_all"] == 4
    assert found["up"]["order"] == ["none", "none", "none", "ascending"]
    assert found["up"]["first"] == [FEW[3]["tensor"], "layers.9.up", "layers.10.up", "layers.2.norm"]
    assert found["down"]["order"] == ["none", "none", "none", "descending"]
    assert found["down"]["first"] == ["layers.10.up", "layers.9.up", FEW[3]["tensor"], "layers.2.norm"]
    assert found["shapes"]["first"] == [FEW[3]["tensor"], "layers.10.up", "layers.9.up", "layers.2.norm"]
    assert found["names"]["first"][1:] == ["layers.2.norm", "layers.9.up", "layers.10.up"]
    picture = screenshot(path, tmp_path / "profile", width)
    check_png(picture)
    assert imread(picture).shape[1] == width


def test_twenty_thousand_tensors_can_be_looked_through(tmp_path: Path) -> None:
    many = [tensor(f"layers.{i}.up", (i * 7919 % 20_000) / 20_000, [i + 1]) for i in range(20_000)]
    found = seen(page(tmp_path, many), PHONE)
    assert (found["shown"], found["shown_all"], found["overflow"]) == (200, 20_000, 0)
    assert found["between"] == 0  # text between the rows: seconds a click
    assert found["up"]["first"][0] == "layers.0.up"
    assert found["names"]["last"] == "layers.19999.up"


def test_without_javascript_everything_is_there(tmp_path: Path) -> None:
    many = [tensor(f"layers.{i}.up", 0.5, [2]) for i in range(400)]
    path = page(tmp_path, many)
    text = re.sub(r"<script>.*?</script>", "", path.read_text(), flags=re.DOTALL)
    assert "<button" not in text
    (tmp_path / "plain.html").write_text(text.replace("<details", "<details open"))
    check_png(screenshot(tmp_path / "plain.html", tmp_path / "profile", DESK))
    assert text.count("<tr><td>layers.") == 400
    assert "capped" not in text[text.index("<main>") :]
