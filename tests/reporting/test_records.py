"""JSON of dataclasses: strict on the way out, checked on the way in, and errors that name file and key."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.records import IF_KNOWN, Record, RecordError, strict

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
)


@dataclass(frozen=True)
class Part:
    name: str
    score: float


@dataclass(frozen=True)
class Sheet(Record):
    step: int
    parts: list[Part]
    errors: dict[str, float]
    chosen: Prediction | None
    alpha: float | None
    note: str | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    schema_version: int = 2


SHEET = Sheet(4, [Part("a", 0.5)], {"relex": 0.1}, Prediction("relex", 20), None)
WRITTEN = {
    "step": 4,
    "parts": [{"name": "a", "score": 0.5}],
    "errors": {"relex": 0.1},
    "chosen": "relex-step_20",
    "alpha": None,
    "schema_version": 2,
}


@given(VALUES)
def test_strict_json_holds_everything_that_is_finite(content: Any) -> None:
    assert json.loads(json.dumps(strict(content), allow_nan=False)) == json.loads(
        json.dumps(content), parse_constant=lambda word: None
    )


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert SHEET.to_json() == WRITTEN
    (tmp_path / "sheet.json").write_text(json.dumps(WRITTEN))
    assert Sheet.read(tmp_path / "sheet.json") == SHEET
    assert Sheet.from_json({**WRITTEN, "note": "n", "of a later release": 1}).to_json() == {**WRITTEN, "note": "n"}


@pytest.mark.parametrize("name", ["relex-step_", "relex-step_-4", "-step_5", "alpharl-score_0.6", "relex-step_5b"])
def test_another_name_is_no_predictions(name: str) -> None:
    with pytest.raises(RecordError, match="is no prediction's name, such as 'relex-step_500'"):
        Sheet.from_json({**WRITTEN, "chosen": name})


def test_null_is_nan_where_a_number_has_to_be_and_none_where_it_need_not() -> None:
    undefined = Sheet(4, [Part("a", math.nan)], {"relex": math.inf}, None, None).to_json()
    assert (undefined["parts"], undefined["errors"]) == ([{"name": "a", "score": None}], {"relex": None})
    read = Sheet.from_json(undefined)
    assert math.isnan(read.parts[0].score)
    assert math.isnan(read.errors["relex"])
    assert read.alpha is None


def test_a_file_without_a_version_is_of_the_first() -> None:
    assert Sheet.from_json({key: value for key, value in WRITTEN.items() if key != "schema_version"}) == SHEET


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "FILE is damaged: "),
        ("[]", "FILE is damaged: it has to be an object, not []"),
        ("{}", "FILE lacks step"),
        ({**WRITTEN, "parts": [{"name": "a"}]}, "FILE lacks parts[0].score"),
        ({**WRITTEN, "parts": {}}, "FILE is damaged: parts has to be a list, not {}"),
        ({**WRITTEN, "parts": [WRITTEN["parts"][0], 3]}, "FILE is damaged: parts[1] has to be an object, not 3"),
        ({**WRITTEN, "step": "4"}, 'FILE is damaged: step has to be a whole number, not "4"'),
        ({**WRITTEN, "step": None}, "FILE is damaged: step has to be a whole number, not null"),
        ({**WRITTEN, "errors": {"relex": "x"}}, "FILE is damaged: errors['relex'] has to be a number, not \"x\""),
        ({**WRITTEN, "chosen": "relex"}, "FILE is damaged: chosen: 'relex' is no prediction's name"),
        ({**WRITTEN, "schema_version": 3}, "FILE has schema_version 3, this relex-verl reads up to 2"),
        ({**WRITTEN, "schema_version": "new"}, "FILE has schema_version 'new', this relex-verl reads up to 2"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "sheet.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RecordError, match=re.escape(says.replace("FILE", str(path)))):
        Sheet.read(path)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Sheet.read(tmp_path / "sheet.json")
