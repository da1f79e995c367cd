"""Whether to stop: a decision from validation scores, never from how good a fit looks.

The search has picked its winner on one half of the prompts, so its score there is too good. The decision is taken on the
other half, by a paired test against the last observed weights on the same prompts; a win there that all prompts together
do not bear out is none.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import comb
from typing import NamedTuple, Protocol

import torch

from relex_verl.maths.extrapolators import Prediction

__all__ = [
    "Advice",
    "Pairs",
    "Scores",
    "advise",
    "alpha_share",
    "decides",
    "paired_p_value",
    "paired_scores",
    "unscored",
]

EXACT = 14  # differences whose signs are enumerated
DRAWS = 99_999
DRAWN_AT_ONCE = 2_000


@dataclass(frozen=True)
class Advice:
    """What RELEX tells the user.

    Attributes:
        action: "stop" (a prediction was scored and won), "keep_training" (none did), "unscored" (nothing to decide on);
            of a run that jumps, "jump" instead of "stop", and "undo" (see `harm`).
        target: the recommended prediction, None when none is recommended.
        reason: one plain sentence, with the numbers.
        score, hold_score: of the prediction and of the last observed weights, on the deciding half; None when unscored.
        prompts: number of prompts in the deciding half.
        p_value: of the paired test.
        alpha: what it had to fall below.
        kl: of a jump with a bound: mean token KL between the policy before and after, in nats.
    """

    action: str
    target: Prediction | None
    reason: str
    score: float | None = None
    hold_score: float | None = None
    prompts: int = 0
    p_value: float | None = None
    alpha: float | None = None
    kl: float | None = field(default=None, metadata={"written": "if known"})  # see `reporting.records`


class Scores(Protocol):
    """What a validation of some weights gave."""

    @property
    def score(self) -> float:
        """Of all prompts, as the run's own metric counts it."""

    @property
    def prompts(self) -> Mapping[str, float]:
        """Prompt -> score; only prompts that came back."""


def decides(prompt: str) -> bool:
    """Whether a prompt belongs to the deciding half; a fixed property of its text, the same in every run."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 2 == 1


def unscored(reason: str) -> Advice:
    """No scores, so nothing is recommended, however straight the lines.

    Explained variance 0.81 and R^2 0.96 are what a pure random walk shows, and published runs with better fits collapsed
    when extrapolated.
    """
    return Advice("unscored", None, f"Unscored: {reason}. Score the predictions on your own validation set before use.")


def alpha_share(tested: int, last: bool) -> float:
    """Share of alpha = 1 - confidence that a cut may spend when a run is tested at several: half of what is left.

    alpha_k = alpha / 2^k at the k-th cut, and all that is left, alpha / 2^(k-1), at one that no other can follow. The
    shares add up to 1 at most: however often a run is cut, a prediction that is no better is recommended in at most
    alpha of all runs.

    Args:
        tested: cuts tested before this one.
        last: no cut can follow.
    """
    return 0.5 ** (tested if last else tested + 1)


class Pairs(NamedTuple):
    """Scores of the same prompts with two weights, each (N,) float64."""

    ours_N: torch.Tensor
    theirs_N: torch.Tensor


def paired_scores(ours: Scores, theirs: Scores, wanted: Callable[[str], bool]) -> Pairs:
    """The prompts that came back with both weights, in the order of the second."""
    prompts = [prompt for prompt in theirs.prompts if prompt in ours.prompts and wanted(prompt)]
    return Pairs(
        torch.tensor([ours.prompts[prompt] for prompt in prompts], dtype=torch.float64),
        torch.tensor([theirs.prompts[prompt] for prompt in prompts], dtype=torch.float64),
    )


def paired_p_value(differences_N: torch.Tensor) -> float:
    """One-sided p-value of "the candidate is no better" from per-prompt score differences: a sign-flip permutation test.

    If the two weights were equally good, a prompt's two scores could have come the other way round: each difference d_i is
    as likely as -d_i. p is the share of all sign patterns whose sum is not below the observed one. Prompts that agree
    carry no sign and do not count. Where all others differ by the same amount (right or wrong, one answer a prompt) that
    is the exact McNemar test, in closed form; else the signs are enumerated up to 14 differences, drawn (seeded) beyond.

    Not a bootstrap of the mean, which is too sure of itself where few prompts differ: 3 wins of 0.5 among 1000 prompts
    give it p = 0.0498, the chance that a resample holds none of the three. Three coins say 1/8.

    Args:
        differences_N: candidate minus last observed, (N,).
    """
    moved_M = differences_N[differences_N != 0].double()
    sizes_M = moved_M.abs()
    if not len(moved_M) or float(sizes_M.max() - sizes_M.min()) <= 1e-12 * float(sizes_M.max()):
        flips, wins = len(moved_M), int((moved_M > 0).sum())
        return sum(comb(flips, k) for k in range(wins, flips + 1)) / 2**flips
    reached = float(moved_M.sum()) - 1e-9 * float(sizes_M.sum())  # equal sums may differ by their rounding
    if len(moved_M) <= EXACT:
        patterns_P = torch.arange(2 ** len(moved_M)).unsqueeze(1)
        bits_PM = (patterns_P >> torch.arange(len(moved_M))) & 1
        return float((((2 * bits_PM - 1).double() @ moved_M) >= reached).double().mean())
    generator, as_large = torch.Generator().manual_seed(0), 0
    for start in range(0, DRAWS, DRAWN_AT_ONCE):
        draws = min(DRAWN_AT_ONCE, DRAWS - start)
        bits_PM = torch.randint(2, (draws, len(moved_M)), generator=generator, dtype=torch.int8)
        as_large += int((((2 * bits_PM - 1).double() @ moved_M) >= reached).sum())
    return (1 + as_large) / (1 + DRAWS)


def advise(
    prediction: Prediction, candidate: Scores, hold: Scores, t_cut: int, confidence: float, share: float = 1.0
) -> Advice:
    """Compare the search's winner with the last observed weights: tested on the deciding half, better on all prompts.

    Args:
        prediction: the candidate.
        candidate: its scores.
        hold: those of the last observed weights.
        t_cut: the last observed step.
        confidence: of the whole run; 0.95 allows alpha = 0.05 over all its cuts.
        share: of alpha that this cut may spend, see `alpha_share`.
    """
    ours, theirs = paired_scores(candidate, hold, decides)
    if not len(ours):
        return unscored("no validation prompt was scored with both weights")
    p_value, alpha = paired_p_value(ours - theirs), (1 - confidence) * share
    won_half = bool(ours.mean() > theirs.mean()) and p_value < alpha
    won = won_half and candidate.score > hold.score
    p_text = "p<0.001" if p_value < 0.001 else f"p={p_value:.3f}"
    asked = f", p<{alpha:.2g} needed" if share < 1 else ""  # where it is not what the user configured
    reason = (
        f"{'Stop' if won else 'Keep training'}: {prediction.folder_name} scores {ours.mean():.3f} against "
        f"{theirs.mean():.3f} of step {t_cut} (n={len(ours)}, {p_text}{asked})"
        f"{', but not on all prompts' if won_half and not won else ''}"
    )
    return Advice(
        "stop" if won else "keep_training",
        prediction if won else None,
        reason,
        ours.mean().item(),
        theirs.mean().item(),
        len(ours),
        p_value,
        alpha,
    )
