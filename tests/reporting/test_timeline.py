"""The cuts of a run in their order, as table and as picture."""

from dataclasses import replace
from pathlib import Path

from cut_reports import cut_report, earlier_cut, scored
from pictures import check_page, check_png
from wandb_mock import WandbMock

from relex_verl.maths.advice import Advice
from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.findings import CutReport
from relex_verl.reporting.page import write_html
from relex_verl.reporting.timeline import timeline_figure, timeline_rows
from relex_verl.reporting.wandb import log_cut

FAR = Prediction("relex", 30)
JUMPED = replace(
    earlier_cut(20),
    advice=Advice("jump", FAR, "Jump: it won", 0.72, 0.6, 200, 0.9),
    validation_scores=[
        scored("observed-step_20", 20, 0.6, None, samples=800),
        scored("relex-step_30", 30, 0.7, samples=800),
        scored("relex-step_60", 60, 0.5, samples=800),
    ],
    rewards={"1": 0.3, "2": 0.4},
)
UNDONE = cut_report(
    40,
    advice=Advice("undo", None, "Undo: behind", 0.5, 0.61, 400, 0.01),
    validation_scores=[scored("observed-step_40", 40, 0.5, None)],
    origin_step=20,
    rewards={"20": 0.4, "21": 0.2},
    earlier_cuts=[JUMPED],
)


def test_a_row_says_what_was_done_at_a_cut_and_what_it_took() -> None:
    jumped, undone = timeline_rows(UNDONE)
    assert jumped == {
        "step": 20,
        "window from": 0,
        "action": "jump",
        "target": 30,
        "horizon": 10,
        "observed": 0.6,
        "prediction": 0.7,
        "p_value": 0.9,
        "validations": 3,
        "samples": 2400,
    }
    assert (undone["window from"], undone["action"], undone["target"], undone["horizon"]) == (20, "undo", None, None)
    assert (undone["observed"], undone["prediction"]) == (0.5, 0.61)  # what the weights that are back had scored
    assert timeline_rows(cut_report(20, earlier_cuts=[earlier_cut(10)]))[1]["observed"] is None  # nothing was scored


def test_the_only_cut_of_a_run_has_no_story(tmp_path: Path) -> None:
    assert timeline_rows(cut_report(20)) == []
    assert timeline_figure(tmp_path, cut_report(20)) is None


def test_page_and_wandb_show_the_run_so_far(tmp_path: Path) -> None:
    drawn = timeline_figure(tmp_path, UNDONE)
    assert drawn is not None
    check_png(drawn)
    write_html(tmp_path / "report.html", UNDONE, {"timeline": drawn})
    assert check_page(tmp_path / "report.html") == 1
    text = (tmp_path / "report.html").read_text()
    for said in ("The run so far", "1 to 20", "» Jumped", "21 to 40", "« Undone"):
        assert said in text
    wandb = WandbMock()
    log_cut(wandb, UNDONE, {"timeline": drawn})
    table = wandb.logged[0][0]["relex/cuts"]
    assert table.columns[:4] == ["step", "window from", "action", "target"]
    assert [row[2] for row in table.data] == ["jump", "undo"]
    assert "relex/figures/timeline" in wandb.logged[0][0]


def test_a_story_without_scores_or_rewards_can_be_drawn(tmp_path: Path) -> None:
    drawn = timeline_figure(tmp_path, cut_report(20, earlier_cuts=[earlier_cut(10)]))
    assert drawn is not None
    check_png(drawn)


def test_rewards_are_written_and_read_back() -> None:
    assert CutReport.from_json(UNDONE.to_json()).earlier_cuts[0].rewards == {"1": 0.3, "2": 0.4}
