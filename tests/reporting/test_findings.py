"""report.json: written and read back through one class, that of 0.1.0 included."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from cut_reports import advised, cut_report, earlier_cut, predicted, scored

from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.findings import CutReport, EarlierCut, Fits
from relex_verl.reporting.records import RecordError

OLD = Path(__file__).parents[1] / "golden" / "report_0_1_0.json"
WON = Prediction("relex", 60, rank=2, fit_from=5)
WHOLE = cut_report(
    30,
    observed_steps=[10, 20, 30],
    advice=advised("stop", WON),
    recommended_path="/out/recommended",
    validation_scores=[scored("observed-step_30", 30, 0.5, None), scored("relex-step_60", 60, 0.6, search_score=0.7)],
    screened_out={"poly": "it misses"},
    predictions=[predicted(Path("/out/predicted/relex-step_60"), 30, WON)],
    backtests={"relex": 0.5, "poly": 3.0},
    fits=Fits({"drift": {"mean": 0.1}}, {"drift": 0.2}, [{"tensor": "w", "shape": [2, 3], "drift": None}]),
    versions={"torch": "2"},
    metrics={"relex/drift": 0.1},
    earlier_cuts=[earlier_cut(10), EarlierCut(20, advised("stop", WON), [scored("relex-step_60", 60, 0.1)], {})],
    steps_saved=70,
)
# As the README and others' scripts know them.
KEYS = ["t_cut", "observed_steps", "advice", "recommended_path", "validation_scores", "screened_out", "predictions"]
KEYS += ["backtests", "fits", "versions", "metrics", "earlier_cuts", "steps_saved", "schema_version"]


def test_what_is_written_is_read_back() -> None:
    written = json.loads(json.dumps(WHOLE.to_json(), allow_nan=False))
    assert list(written) == KEYS
    assert CutReport.from_json(written) == WHOLE


def test_what_is_advised_is_the_name_of_a_folder() -> None:
    """Its rank and first step are those of the run's checkpoints."""
    written = WHOLE.to_json()
    assert written["advice"]["target"] == "relex-step_60"
    assert written["earlier_cuts"][1]["advice"]["target"] == "relex-step_60"
    read = CutReport.from_json(written)
    assert read.advice.target == read.earlier_cuts[1].advice.target == WON


def test_numbers_that_are_not_finite_are_null_and_back() -> None:
    written = cut_report(4, validation_scores=[scored("relex-step_9", 9, math.inf)], backtests={"relex": math.nan})
    content = written.to_json()
    assert content["validation_scores"][0]["score"] is None
    read = CutReport.from_json(content)
    assert math.isnan(read.validation_scores[0].score)
    assert math.isnan(read.backtests["relex"])
    assert read.to_json() == content


def test_a_report_of_0_1_0_is_read() -> None:
    report = CutReport.read(OLD)
    content = json.loads(OLD.read_text())
    assert "schema_version" not in content
    assert report.to_json() == {
        **content,
        "schema_version": 1,
        "predictions": [{**row, "schema_version": 1} for row in content["predictions"]],
    }
    assert report.advice.target == Prediction("relex", 200)
    assert (report.t_cut, report.validation_scores[0].name) == (30, "observed-step_30")


def test_a_summary_is_what_later_reports_say() -> None:
    assert WHOLE.summary == EarlierCut(30, WHOLE.advice, WHOLE.validation_scores, WHOLE.screened_out)


@pytest.mark.parametrize("key", [key for key in KEYS if key != "schema_version"])
def test_no_key_may_be_missing(key: str, tmp_path: Path) -> None:
    content = {name: value for name, value in WHOLE.to_json().items() if name != key}
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(RecordError, match=re.escape(f"{tmp_path / 'report.json'} lacks {key}")):
        CutReport.read(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"advice": {}}, "lacks advice.action"),
        ({"schema_version": 2}, "has schema_version 2, this relex-verl reads up to 1"),
        ({"observed_steps": [1, "2"]}, "observed_steps[1] has to be a whole number"),
        ({"fits": None}, "fits has to be an object, not null"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(RecordError, match=re.escape(says)):
        CutReport.from_json({**WHOLE.to_json(), **wrong})
