"""What a cut shows, where, and that a part that fails takes no other with it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pictures import check_page, check_png
from stand_ins import CUT, Host
from wandb_mock import WandbMock

from relex_verl.run import announce
from relex_verl.run.config import RelexConfig
from relex_verl.run.cut import Verdict, decide
from relex_verl.run.output import OutputFolder

CONFIG = RelexConfig.from_mapping({"t_cut": CUT, "observe_every": 1, "targets": [20], "max_candidates": 2})
FITS = {"tensors": [{"tensor": "w", "line_r2": 0.9}], "random_walk_null": {"line_r2": 0.96}}
WINDOW = {"steps": [1, 2, 3, 4], "fits": FITS, "backtests": {"relex": 0.5}, "drift": 0.0, "agreement": 1.0}


@pytest.fixture
def verdict() -> Verdict:
    return decide(Host({CUT: 0.5, 20: 0.9}), CONFIG, CONFIG.plan(100), WINDOW)  # type: ignore[arg-type]


def shown(folder: Path, verdict: Verdict, loggers: dict[str, Any]) -> dict[str, Any]:
    output = OutputFolder(folder)
    written = output.path / "predicted" / "relex-step_20"
    written.mkdir(parents=True, exist_ok=True)
    (written / "relex.json").write_text('{"target": 20}')
    found = announce.report(CUT, WINDOW, verdict, output, {written: {"target": 20}})
    announce.show(output, loggers, CUT, {**found, "steps_saved": 16}, {}, verdict)
    return found


def test_the_report_of_a_cut(tmp_path: Path, verdict: Verdict) -> None:
    found = shown(tmp_path, verdict, {})
    assert found["advice"]["action"] == "stop"
    assert found["recommended_path"] == str(tmp_path / "recommended")
    assert found["predictions"] == [{"path": str(tmp_path / "predicted" / "relex-step_20"), "target": 20}]
    assert [row["name"] for row in found["validation_scores"]] == ["observed-step_4", "relex-step_20", "relex-step_40"]
    json.dumps(found)


def test_a_cut_is_shown_at_the_top_and_kept_by_itself(tmp_path: Path, verdict: Verdict) -> None:
    shown(tmp_path, verdict, {})
    kept = tmp_path / "scores" / f"cut_{CUT}"
    assert (tmp_path / "report.html").read_text() == (kept / "report.html").read_text()
    assert check_page(kept / "report.html") == 1
    check_png(tmp_path / "figures" / "scores.png")
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
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.message == "RELEX: drawing the scores failed; the decision stands"
    assert warning.exc_info
