"""relex.json: what it says of a checkpoint, and of which other one it says the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.provenance import Checkout, Provenance
from relex_verl.reporting.records import RecordError

PREDICTED = Provenance.of(Prediction("relex", 60, 2, 3), "base", 30, [10, 20, 30], Path("/t"))
BASELINE = Provenance.of_baseline("alpharl", None, {"scores": {10: 0.5}, "wanted": 0.9}, "base", 30, [10], Path("/t"))
REBUILT = Provenance.of_reconstruction(20, 2, "base", [10, 20, 30], Path("/t"))
# As 0.1.0 wrote it.
OLD = {"base_model": "base", "method": "relex", "rank": 2, "t_cut": 30, "target": 60, "fit_from": 3}
OLD |= {"observed_steps": [10, 20, 30], "trajectory": "/t", "versions": {"relex-verl": "0.1.0"}}
KEYS = OLD.keys() - {"fit_from"} | {"schema_version"}  # on which others rely


def test_it_names_what_made_it() -> None:
    written = PREDICTED.to_json()
    assert {key: written[key] for key in OLD if key != "versions"} == {
        key: OLD[key] for key in OLD if key != "versions"
    }
    assert {"python", "torch"} <= written["versions"].keys()
    assert written.keys() == KEYS | {"fit_from"}


def test_keys_are_there_where_they_say_something() -> None:
    assert BASELINE.to_json().keys() == KEYS | {"settings"}
    assert BASELINE.to_json()["target"] is None
    assert REBUILT.to_json().keys() == KEYS | {"step"}
    assert (REBUILT.t_cut, REBUILT.target, REBUILT.to_json()["step"]) == (30, 20, 20)


def test_a_window_is_named_where_it_is_not_the_first() -> None:
    facts = (Prediction("relex", 60, 2, 3), "base", 30, [10, 20, 30], Path("/t"))
    assert Provenance.of(*facts, 0).to_json() == PREDICTED.to_json()
    assert PREDICTED.differing(Provenance.of(*facts, 2)) == [("window", None, 2)]
    checkout = Checkout.of(20, 0.0, "base", Path("/t"), 1, True).to_json()
    assert (checkout["window"], checkout["after_jump"]) == (1, True)
    assert not {"window", "after_jump"} & Checkout.of(20, 0.0, "base", Path("/t")).to_json().keys()
    with pytest.raises(RecordError, match="after_jump has to be true or false, not 1"):
        Checkout.from_json({**checkout, "after_jump": 1})


@pytest.mark.parametrize("provenance", [PREDICTED, BASELINE, REBUILT], ids=lambda one: one.method)
def test_it_is_read_back(provenance: Provenance, tmp_path: Path) -> None:
    (tmp_path / "relex.json").write_text(json.dumps(provenance.to_json()))
    read = Provenance.read(tmp_path / "relex.json")
    assert read.to_json() == provenance.to_json()
    assert read.differing(provenance) == provenance.differing(read) == []


def test_what_0_1_0_wrote_is_the_same_prediction() -> None:
    old = Provenance.from_json(OLD)
    assert old.differing(PREDICTED) == []
    assert old.versions == {"relex-verl": "0.1.0"}  # not those of today


def test_what_makes_other_weights_is_named() -> None:
    assert PREDICTED.differing(replace(PREDICTED, rank=1)) == [("rank", 2, 1)]
    assert PREDICTED.differing(replace(PREDICTED, observed_steps=[30], t_cut=31)) == [
        ("t_cut", 30, 31),
        ("observed_steps", [10, 20, 30], [30]),
    ]
    assert [key for key, _, _ in BASELINE.differing(replace(BASELINE, settings={"wanted": 0.9}))] == ["settings"]
    assert PREDICTED.differing(replace(PREDICTED, versions={})) == []


def test_from_step_0_on_is_from_step_1_on() -> None:
    first, zeroth = replace(PREDICTED, fit_from=1), replace(PREDICTED, fit_from=0)
    assert first.differing(zeroth) == []
    assert zeroth.differing(replace(PREDICTED, fit_from=2)) == [("fit_from", 1, 2)]


def test_a_checkout_is_told_from_a_prediction() -> None:
    checkout = Checkout.of(20, 0.0, "base", Path("/t"))
    assert Checkout.from_json(checkout.to_json()) == checkout
    with pytest.raises(RecordError, match="lacks method"):
        Provenance.from_json(checkout.to_json())
    for provenance in (PREDICTED, BASELINE, REBUILT):
        with pytest.raises(RecordError, match="lacks "):
            Checkout.from_json(provenance.to_json())
