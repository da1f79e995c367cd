"""What may be jumped to, and what is taken back: tested against harm, on prompts that the search has not seen."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relex_verl.maths.advice import decides
from relex_verl.maths.extrapolators import Prediction
from relex_verl.maths.harm import judge_distance, judge_jump, judge_undo, token_kl

PREDICTION = Prediction("relex", 60)
PROMPTS = [f"prompt {i}" for i in range(600)]
SEARCHED = [prompt for prompt in PROMPTS if not decides(prompt)]
DECIDING = [prompt for prompt in PROMPTS if decides(prompt)]


def scores(**shares: float) -> Any:
    """The first so many of each half are right."""
    right = {
        p
        for half, name in ((SEARCHED, "searched"), (DECIDING, "deciding"))
        for p in half[: int(shares[name] * len(half))]
    }
    return SimpleNamespace(prompts={prompt: float(prompt in right) for prompt in PROMPTS}, score=0.0)


HOLD = scores(searched=0.5, deciding=0.5)


@pytest.mark.parametrize(
    ("searched", "deciding", "action"),
    [
        (0.6, 0.6, "jump"),
        (0.6, 0.5, "jump"),  # no gain on the other half is no harm
        (0.6, 0.499, "jump"),  # nor is what chance does
        (0.6, 0.45, "keep_training"),
        (0.5, 0.9, "keep_training"),  # it has to win where it was looked for
        (0.4, 0.9, "keep_training"),
    ],
)
def test_a_winner_of_the_search_is_taken_unless_the_other_half_speaks_against_it(
    searched: float, deciding: float, action: str
) -> None:
    advice = judge_jump(PREDICTION, scores(searched=searched, deciding=deciding), HOLD, 20, confidence=0.8)
    assert advice.action == action
    assert advice.target == (PREDICTION if action == "jump" else None)
    assert advice.prompts == len(DECIDING)
    assert advice.score == pytest.approx(deciding, abs=0.01)
    assert advice.reason.startswith("Jump:" if action == "jump" else "Keep training:")
    assert "relex-step_60" in advice.reason


def test_without_prompts_of_both_there_is_nothing_to_decide_on() -> None:
    nothing = SimpleNamespace(prompts={}, score=0.0)
    assert judge_jump(PREDICTION, nothing, HOLD, 20, 0.8).action == "unscored"
    assert judge_undo(nothing, HOLD, 40, 20, 0.8) is None


@given(st.floats(0.5, 0.99))
def test_more_confidence_refuses_and_undoes_less(confidence: float) -> None:
    worse = scores(searched=0.6, deciding=0.47)
    strict, lenient = (judge_jump(PREDICTION, worse, HOLD, 20, level) for level in (0.5, confidence))
    assert strict.action == "keep_training"
    if lenient.action == "keep_training":
        assert lenient.p_value is not None
        assert lenient.p_value < 1 - confidence


def test_an_equal_candidate_is_refused_in_the_share_that_is_promised() -> None:
    """Scores of the two differ in 12% of the prompts, as often for the better as for the worse."""
    generator, refused, runs = torch.Generator().manual_seed(0), 0, 400
    for _ in range(runs):
        drawn = torch.rand(len(DECIDING), generator=generator).tolist()
        moved = {p: (d < 0.06) - (0.06 <= d < 0.12) for p, d in zip(DECIDING, drawn, strict=True)}
        hold = SimpleNamespace(prompts=dict.fromkeys(PROMPTS, 0.5), score=0.5)
        candidate = SimpleNamespace(prompts={p: 0.5 + moved.get(p, 0.1) for p in PROMPTS}, score=0.5)
        refused += judge_jump(PREDICTION, candidate, hold, 20, 0.8).action != "jump"
    assert refused / runs <= 0.2 + 3 * (0.2 * 0.8 / runs) ** 0.5


@pytest.mark.parametrize(("now", "undone"), [(0.6, False), (0.5, False), (0.499, False), (0.45, True)])
def test_a_jump_is_undone_if_what_came_of_it_is_behind_the_weights_before(now: float, undone: bool) -> None:
    advice = judge_undo(scores(searched=now, deciding=now), HOLD, 40, 20, confidence=0.8)
    assert (advice is not None) == undone
    if advice is not None:
        assert (advice.action, advice.target, advice.prompts) == ("undo", None, len(PROMPTS))
        assert advice.reason.startswith("Undo: step 40 scores 0.4")
        assert "step 20" in advice.reason


def test_the_estimate_of_the_kl_is_that_of_the_distributions() -> None:
    """Against the sum over the vocabulary, by tokens that the first policy draws."""
    torch.manual_seed(0)
    before_V, after_V = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    exact = float((before_V.exp() * (before_V - after_V)).sum())
    drawn_N = torch.multinomial(before_V.exp(), 200_000, replacement=True)
    estimate_N = token_kl(before_V[drawn_N], after_V[drawn_N])
    assert float(estimate_N.mean()) == pytest.approx(exact, rel=0.02)
    assert float(estimate_N.min()) >= 0
    assert float(token_kl(before_V, before_V).abs().max()) == 0
    # Where the weights go wild it is no number, or too large for one, and never within a bound.
    assert not token_kl(torch.tensor([-2000.0]), torch.tensor([-1.0])) <= 1e9


@pytest.mark.parametrize(
    ("kl", "action", "says"),
    [
        (0.0123, "jump", r"Jump: relex-step_60 scores .* of harm\), token KL 0.0123 of 0.1 allowed"),
        (0.1, "jump", "token KL 0.1 of 0.1 allowed"),
        (
            0.101,
            "keep_training",
            r"Keep training: too far from the policy \(token KL 0.101 of 0.1 allowed\); relex-step_60",
        ),
        (float("inf"), "keep_training", "token KL inf of 0.1 allowed"),
        (float("nan"), "keep_training", "token KL nan of 0.1 allowed"),
    ],
)
def test_a_jump_that_leads_too_far_is_refused_with_the_figure(kl: float, action: str, says: str) -> None:
    jump = judge_jump(PREDICTION, scores(searched=0.6, deciding=0.6), HOLD, 20, confidence=0.8)
    advice = judge_distance(jump, kl, 0.1)
    assert (advice.action, advice.target) == (action, PREDICTION if action == "jump" else None)
    assert re.match(f".*{says}", advice.reason)
    assert advice.kl is kl
    assert (advice.score, advice.prompts, advice.p_value) == (jump.score, jump.prompts, jump.p_value)
