from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relex_verl.maths.advice import advise, alpha_share, decides, paired_p_value, unscored
from relex_verl.maths.extrapolators import Prediction

PROMPTS = [f"What is {i} + {i}?" for i in range(400)]
DECIDING = [prompt for prompt in PROMPTS if decides(prompt)]
OTHERS = [prompt for prompt in PROMPTS if not decides(prompt)]


LATE = Prediction("relex", 200)


class Scored(NamedTuple):
    prompts: dict[str, float]
    score: float


def scored(prompts, overall=None):
    """Scores of prompts; over all of them their mean, unless the run's metric counts otherwise."""
    return Scored(prompts, sum(prompts.values()) / max(1, len(prompts)) if overall is None else overall)


def scores(right, overall=None):
    """1 for the prompts in `right`, 0 for all others."""
    return scored({prompt: float(prompt in set(right)) for prompt in PROMPTS}, overall)


def test_half_of_the_prompts_decide_and_always_the_same_ones():
    assert 150 < len(DECIDING) < 250
    assert [decides(prompt) for prompt in ("a", "e", "é")] == [False, True, False]  # in every run, on every machine


def test_without_scores_no_prediction_is_recommended():
    for advice in (unscored("no validation set"), advise(LATE, scored({}), scores([]), 5, 0.95)):
        assert (advice.action, advice.target, advice.p_value) == ("unscored", None, None)
    assert "no validation set" in unscored("no validation set").reason
    assert advise(LATE, scores(OTHERS), scored(dict.fromkeys(OTHERS, 0.0)), 5, 0.95).action == "unscored"


def test_a_clear_win_on_the_deciding_half_is_advice_to_stop():
    advice = advise(LATE, scores(DECIDING), scores(DECIDING[: len(DECIDING) // 2]), 60, 0.95)
    assert (advice.action, advice.target) == ("stop", LATE)
    assert (advice.score, advice.prompts) == (1.0, len(DECIDING))
    assert advice.hold_score == pytest.approx(0.5, abs=0.01)
    for part in ("Stop", "relex-step_200", "1.000", "0.50", "step 60", f"n={len(DECIDING)}", "p<0.001"):
        assert part in advice.reason


def test_the_half_that_the_search_saw_does_not_count():
    advice = advise(LATE, scores(OTHERS), scores([]), 60, 0.95)
    assert (advice.action, advice.target) == ("keep_training", None)
    assert advice.score == advice.hold_score == 0.0


@pytest.mark.parametrize(("overall", "won"), [(0.51, True), (0.5, False), (0.49, False)])
def test_a_win_on_the_deciding_half_must_be_one_on_all_prompts(overall, won):
    """By the run's own metric, which may count prompts that are not among those compared."""
    advice = advise(LATE, scores(DECIDING, overall), scores([], overall=0.5), 60, 0.95)
    assert (advice.action, advice.target) == (("stop", LATE) if won else ("keep_training", None))
    assert advice.reason.startswith("Stop: relex" if won else "Keep training: relex")
    assert advice.reason.endswith("p<0.001)" if won else "p<0.001), but not on all prompts")
    assert (advice.score, advice.hold_score) == (1.0, 0.0)


def test_a_loss_on_the_deciding_half_is_not_said_to_be_one_on_all_prompts():
    assert "all prompts" not in advise(LATE, scores([], 0.1), scores(DECIDING, 0.9), 60, 0.95).reason


@pytest.mark.parametrize(
    ("wins", "confidence", "action"),
    # All disagreements won: p = 2^-wins.
    [
        (0, 0.5, "keep_training"),
        (4, 0.95, "keep_training"),
        (5, 0.95, "stop"),
        (5, 0.99, "keep_training"),
        (7, 0.99, "stop"),
    ],
)
def test_a_win_must_pass_the_test(wins, confidence, action):
    advice = advise(LATE, scores(DECIDING[:wins]), scores([]), 60, confidence)
    assert advice.action == action
    assert advice.p_value == pytest.approx(2.0**-wins)


def test_a_loss_never_wins():
    assert advise(LATE, scores([]), scores(DECIDING[:50]), 60, 0.5).action == "keep_training"


@pytest.mark.parametrize(("wins", "losses", "ties"), [(0, 0, 0), (0, 0, 5), (3, 1, 2), (6, 6, 0), (2, 7, 1), (9, 0, 0)])
def test_right_or_wrong_answers_take_the_exact_sign_test(wins, losses, ties):
    differences = torch.tensor([1.0] * wins + [-1.0] * losses + [0.0] * ties, dtype=torch.float64)
    coins = [sum(toss) for toss in product([0, 1], repeat=wins + losses)]
    expected = sum(heads >= wins for heads in coins) / len(coins)
    assert paired_p_value(differences) == pytest.approx(expected)


def enumerated(differences):
    """Share of all sign patterns whose sum is not below the observed one."""
    sizes = [abs(one) for one in differences]
    sums = [sum(s * d for s, d in zip(signs, sizes, strict=True)) for signs in product([-1, 1], repeat=len(sizes))]
    return sum(one >= sum(differences) - 1e-9 for one in sums) / len(sums)


@given(st.lists(st.sampled_from([-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]), max_size=9))
def test_mean_scores_take_a_sign_flip_test(differences):
    got = paired_p_value(torch.tensor(differences, dtype=torch.float64))
    assert got == pytest.approx(enumerated(differences) if differences else 1.0)
    with_ties = torch.tensor([*differences, *[0.0] * 1000], dtype=torch.float64)
    assert paired_p_value(with_ties) == pytest.approx(got)


def test_three_wins_among_a_thousand_prompts_are_three_coins():
    """A bootstrap of the mean would say 0.0498: the chance that a resample holds none of the three."""
    differences = torch.zeros(1000, dtype=torch.float64)
    differences[:3] = 0.5
    assert paired_p_value(differences) == 1 / 8
    hold = dict.fromkeys(PROMPTS, 0.0)
    three = {**hold, **dict.fromkeys(DECIDING[:3], 0.5)}
    assert advise(LATE, scored(three), scored(hold), 60, 0.95).action == "keep_training"


def test_drawn_signs_agree_with_a_normal_test_and_with_themselves():
    rng = np.random.default_rng(0)
    for mean, expected in ((0.0, 0.5), (0.033, 0.05), (0.5, 0.00001), (-0.5, 1.0)):
        noise = rng.standard_normal(400) * 0.4
        differences = torch.tensor(noise - noise.mean() + mean)  # one standard error is 0.02: 0.033 is 1.645 of them
        got = paired_p_value(differences)
        assert got == pytest.approx(expected, abs=0.02)
        assert got == paired_p_value(differences)
    assert paired_p_value(differences * 0 + torch.linspace(0.1, 0.2, 400)) == 1 / 100_000


def test_a_true_null_is_rejected_as_often_as_it_may_be():
    """Few prompts differ, by different amounts: the case in which a bootstrap rejects too often."""
    generator = torch.Generator().manual_seed(1)
    rejected = 0
    for _ in range(400):
        differences = torch.zeros(300, dtype=torch.float64)
        sizes = torch.rand(8, generator=generator, dtype=torch.float64)
        differences[:8] = sizes * (2 * torch.randint(2, (8,), generator=generator) - 1)
        rejected += paired_p_value(differences) < 0.05
    assert rejected <= 400 * 0.05 + 3 * (400 * 0.05 * 0.95) ** 0.5


@given(st.integers(0, 30))
def test_all_cuts_of_a_run_spend_alpha_once(cuts):
    shares = [alpha_share(tested, last=False) for tested in range(cuts)] + [alpha_share(cuts, last=True)]
    assert sum(shares) == pytest.approx(1.0)
    assert all(later <= sooner for sooner, later in pairwise(shares))


def test_the_sentence_names_the_level_where_it_is_not_the_configured_one():
    won, lost = scores(DECIDING[:6]), scores([])  # p = 1/64
    assert advise(LATE, won, lost, 60, 0.95).reason.endswith("p=0.016)")
    stricter = advise(LATE, won, lost, 60, 0.95, share=0.25)
    assert stricter.action == "keep_training"
    assert stricter.alpha == pytest.approx(0.0125)
    assert stricter.reason.endswith("p=0.016, p<0.013 needed)")
