"""The search along the line, on curves whose best horizon is known; what the window may leave out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relex_verl.maths.search import MAX_HORIZON, contenders, next_target, screen, search

CUT = 30


def hump(peak: float, hold: float = 0.6, height: float = 0.75):
    """Score against horizon as it is measured: rises to a peak, collapses beyond."""

    def score(step: int) -> float:
        if step <= peak:
            return hold + (height - hold) * (step - CUT) / (peak - CUT)
        return max(0.0, height - 0.6 * (step - peak) / peak)

    return score


@pytest.mark.parametrize("peak", [45, 70, 100, 150, 200, 300, 500])
def test_six_scores_find_most_of_what_there_is(peak: int) -> None:
    score = hump(peak)
    scored = search(lambda _, target: score(target), ["relex"], [60, 100, 150, 200], CUT, score(CUT), 6)
    assert len(scored) <= 6
    assert max(one.score for one in scored) >= 0.6 + 0.75 * 0.15


def test_configured_targets_come_first_and_in_order() -> None:
    score = hump(400)
    scored = search(lambda _, target: score(target), ["relex"], [200, 60, 100], CUT, score(CUT), 3)
    assert [one.target for one in scored] == [60, 100, 200]


def test_it_stops_going_out_when_the_score_falls() -> None:
    score = hump(50)
    scored = search(lambda _, target: score(target), ["relex"], [60, 100, 150, 200], CUT, score(CUT), 6)
    assert 150 not in [one.target for one in scored]
    assert any(CUT < one.target < 60 for one in scored)


def test_a_dip_within_the_margin_is_noise() -> None:
    tried = {60: 0.64, 100: 0.63}
    assert next_target(tried, [60, 100, 150], CUT, 0.6, margin=0.02) == 150
    assert next_target(tried, [60, 100, 150], CUT, 0.6, margin=0.0) != 150


def test_beyond_the_targets_it_doubles_up_to_the_limit() -> None:
    tried, target = {}, 60
    while target is not None:
        tried[target] = float(target)
        target = next_target(tried, [60], CUT, 0.0)
    assert max(tried) <= MAX_HORIZON * CUT
    assert {60, 120, 240, 480} <= tried.keys()


@given(
    st.dictionaries(st.integers(31, 800), st.floats(0, 1), max_size=8),
    st.lists(st.integers(31, 800), min_size=1, max_size=5),
    st.floats(0, 1),
    st.floats(0, 0.1),
)
def test_a_proposal_is_new_and_after_the_cut(tried, targets, hold, margin) -> None:
    proposal = next_target(tried, targets, CUT, hold, margin)
    assert proposal is None or (proposal > CUT and proposal not in tried)


def test_the_budget_is_shared_by_the_methods() -> None:
    scored = search(lambda method, target: 0.5, ["relex", "anchored"], [60, 100], CUT, 0.5, 4)
    assert [one.method for one in scored] == ["relex", "anchored", "relex", "anchored"]


def test_screening_names_its_reasons_and_keeps_one() -> None:
    kept, reasons = screen({"relex": 0.7, "poly": 3.0, "expo": 1.5}, drift=0.1, agreement=0.9)
    assert kept == ["relex", "expo"]
    assert "3.00 times" in reasons["poly"]
    kept, reasons = screen({"relex": 1.4, "anchored": 1.2}, drift=0.1, agreement=0.9)
    assert kept == ["anchored"]
    assert reasons.keys() == {"relex"}
    kept, reasons = screen({"two-point": 0.5, "relex": 0.6, "anchored": 0.7}, drift=0.9, agreement=0.9)
    assert kept == ["two-point"]
    assert "turned" in reasons["relex"]
    assert "disagree" in screen({"hold": 0.5, "relex": 0.6}, drift=0.1, agreement=0.01)[1]["relex"]
    assert screen({"relex": float("nan")}, drift=float("nan"), agreement=float("nan"))[0] == ["relex"]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=6, max_size=6), min_size=1, max_size=4))
def test_who_is_told_from_the_best_is_out(scores: list[list[float]]) -> None:
    named = {i: dict(zip("abcdef", of, strict=True)) for i, of in enumerate(scores)}
    best = scores[max(range(len(scores)), key=lambda i: (sum(scores[i]), -i))]
    within = set()
    for i, of in enumerate(scores):
        behind = torch.tensor(best, dtype=torch.float64) - torch.tensor(of, dtype=torch.float64)
        if behind.mean() <= behind.std() / 6**0.5 + 1e-12:
            within.add(i)
    left = contenders(named)
    assert set(left) == within
    assert sum(scores[left[0]]) == sum(best)
