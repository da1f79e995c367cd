"""What a cut shows, where, and that a part that fails takes no other with it."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cut_reports import FOUND, earlier_cut, scored
from pictures import check_page, check_png
from stand_ins import CUT, Host
from wandb_mock import WandbMock

from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.findings import Cost, CutReport, Fits
from relex_verl.reporting.provenance import Provenance
from relex_verl.run import announce
from relex_verl.run.config import RelexConfig
from relex_verl.run.cut import Verdict, decide
from relex_verl.run.output import OutputFolder
from relex_verl.run.schedule import Schedule

CONFIG = RelexConfig.from_mapping({"t_cut": CUT, "observe_every": 1, "targets": [20], "max_candidates": 2})
FITS = Fits(summary={}, random_walk_null={"line_r2": 0.96}, tensors=[{"tensor": "w", "line_r2": 0.9}])
PROVENANCE = Provenance.of(Prediction("relex", 20), "base", CUT, FOUND.steps, Path("/run/trajectory"))
FINDINGS = replace(FOUND, fits=FITS)


@pytest.fixture
def verdict() -> Verdict:
    return decide(Host({CUT: 0.5, 20: 0.9}), CONFIG, CONFIG.plan(100), FINDINGS)  # type: ignore[arg-type]


def shown(folder: Path, verdict: Verdict, loggers: dict[str, Any]) -> CutReport:
    output = OutputFolder(folder)
    folder = output.path / "predicted" / "relex-step_20"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "relex.json").write_text(json.dumps(PROVENANCE.to_json()))
    written = {folder: PROVENANCE}
    schedule = Schedule(CONFIG, 100, samples_a_step=128)
    before = [scored("observed-step_2", 2, 0.5, None, prompts=100, samples=200, seconds=7.0)]
    schedule.earlier.append(replace(earlier_cut(2), validation_scores=before))
    report = announce.report(CUT, FINDINGS, verdict, output, written, {"relex/drift": 0.1}, schedule)
    announce.show(output, loggers, report, {}, verdict)
    return report


def test_the_report_of_a_cut(tmp_path: Path, verdict: Verdict) -> None:
    report = shown(tmp_path, verdict, {})
    assert report.advice.action == "stop"
    assert report.recommended_path == str(tmp_path / "recommended")
    # One sample for each of 400 prompts, three times, and the 200 of the cut before: 11 steps of 128 samples.
    assert report.scoring == Cost(4, 1400, 10.0, 1400 / 128)
    assert report.steps_saved == 100 - CUT - 11
    assert announce.spent(report) == {
        "relex/steps_saved": 85.0,
        "relex/scoring/validations": 4.0,
        "relex/scoring/samples": 1400.0,
        "relex/scoring/seconds": 10.0,
        "relex/scoring/steps": 1400 / 128,
    }
    assert verdict.metrics()["relex/val/samples"] == 1200.0
    page = (tmp_path / "report.html").read_text()
    assert "in the run so far 1,400 samples in 10 s, as many as 10.9 training steps generate" in page
    assert report.next_cut is None
    (prediction,) = report.predictions
    assert prediction.path == str(tmp_path / "predicted" / "relex-step_20")
    assert prediction.to_json() == {**PROVENANCE.to_json(), "path": prediction.path}
    assert [row.name for row in report.validation_scores] == ["observed-step_4", "relex-step_20", "relex-step_40"]
    assert (report.observed_steps, report.fits, report.backtests) == (FOUND.steps, FITS, FOUND.backtests)
    assert report.metrics == {"relex/drift": 0.1}
    assert [cut.t_cut for cut in report.earlier_cuts] == [2]
    assert CutReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def test_nothing_is_recommended_or_saved_without_a_win(tmp_path: Path) -> None:
    lost = decide(Host({CUT: 0.9, 20: 0.5}), CONFIG, CONFIG.plan(100), FINDINGS)
    report = shown(tmp_path, lost, {})
    assert (report.advice.action, report.recommended_path, report.steps_saved) == ("keep_training", None, 0)
    assert report.next_cut == 2 * CUT


def test_a_cut_is_shown_at_the_top_and_kept_by_itself(tmp_path: Path, verdict: Verdict) -> None:
    shown(tmp_path, verdict, {})
    kept = tmp_path / "scores" / f"cut_{CUT}"
    assert (tmp_path / "report.html").read_text() == (kept / "report.html").read_text()
    assert check_page(kept / "report.html") == 2
    for name in ("scores", "timeline"):
        check_png(tmp_path / "figures" / f"{name}.png")
    names = {"observed-step_4", "relex-step_20", "relex-step_40"}
    assert {path.stem for path in kept.glob("*.json")} == names


@pytest.mark.parametrize("others", [{}, {"console": object(), "tensorboard": object()}])
def test_wandb_gets_nothing_where_verl_does_not_log_to_it(
    others: dict[str, Any], tmp_path: Path, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = WandbMock()
    shown(tmp_path, verdict, others)
    assert wandb.logged == []
    shown(tmp_path, verdict, {**others, "wandb": wandb})
    ((logged, step),) = wandb.logged
    assert step == CUT
    assert "relex/figures/scores" in logged
    assert wandb.artifacts.keys() == {"relex-step_20-r1"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_part_that_fails_takes_no_other_with_it(
    tmp_path: Path, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "figures").write_text("a file where the pictures' folder should be")
    wandb = WandbMock()
    with caplog.at_level(logging.INFO, "relex_verl"):
        shown(tmp_path, verdict, {"wandb": wandb})
    assert (tmp_path / "report.html").exists()
    assert wandb.logged
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    parts = ("drawing the scores", "drawing the cuts so far")
    assert [one.message for one in warnings] == [f"RELEX: {part} failed; the decision stands" for part in parts]
    assert all(one.exc_info for one in warnings)
