"""Whether to stop: a decision from validation scores, never from how good a fit looks.

The search has picked its winner on one half of the prompts, so its score there is too good. The decision is taken on the
other half, by a paired test against the last observed weights on the same prompts.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

import torch

__all__ = ["Advice", "advise", "decides", "paired_p_value", "unscored"]

RESAMPLES = 9999


@dataclass(frozen=True)
class Advice:
    """What RELEX tells the user.

    Attributes:
        action: "stop" (a prediction was scored and won), "keep_training" (none did), "unscored" (nothing to decide on).
        target: folder name of the recommended prediction, None when none is recommended.
        reason: one plain sentence, with the numbers.
        score, hold_score: of the prediction and of the last observed weights, on the deciding half; None when unscored.
        prompts: number of prompts in the deciding half.
        p_value: of the paired test.
    """

    action: str
    target: str | None
    reason: str
    score: float | None = None
    hold_score: float | None = None
    prompts: int = 0
    p_value: float | None = None


def decides(prompt: str) -> bool:
    """Whether a prompt belongs to the deciding half; a fixed property of its text, the same in every run."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 2 == 1


def unscored(reason: str) -> Advice:
    """No scores, so nothing is recommended, however straight the lines.

    Explained variance 0.81 and R^2 0.96 are what a pure random walk shows, and published runs with better fits collapsed
    when extrapolated.
    """
    return Advice("unscored", None, f"Unscored: {reason}. Score the predictions on your own validation set before use.")


def paired_p_value(differences_N: torch.Tensor) -> float:
    """One-sided p-value of "the candidate is no better" from per-prompt score differences.

    Differences of -1, 0 and 1 (one right-or-wrong answer a prompt): the exact McNemar test, a sign test on the prompts
    that disagree. Others: a paired bootstrap of the mean, seeded.

    Args:
        differences_N: candidate minus last observed, (N,).
    """
    if not len(differences_N):
        return 1.0
    if bool(torch.isin(differences_N, torch.tensor([-1.0, 0.0, 1.0], dtype=differences_N.dtype)).all()):
        wins, losses = int((differences_N > 0).sum()), int((differences_N < 0).sum())
        return sum(comb(wins + losses, k) for k in range(wins, wins + losses + 1)) / 2 ** (wins + losses)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(differences_N), (RESAMPLES, len(differences_N)), generator=generator)
    no_better = int((differences_N[drawn].mean(dim=1) <= 0).sum())
    return (1 + no_better) / (1 + RESAMPLES)


def advise(
    name: str, candidate: Mapping[str, float], hold: Mapping[str, float], t_cut: int, confidence: float
) -> Advice:
    """Compare the search's winner with the last observed weights on the deciding half.

    Args:
        name: of the candidate.
        candidate: prompt -> score, all prompts.
        hold: prompt -> score of the last observed weights.
        t_cut: the last observed step.
        confidence: level of the test; 0.95 wants p below 0.05.
    """
    prompts = [prompt for prompt in hold if prompt in candidate and decides(prompt)]
    if not prompts:
        return unscored("no validation prompt was scored with both weights")
    ours = torch.tensor([candidate[prompt] for prompt in prompts], dtype=torch.float64)
    theirs = torch.tensor([hold[prompt] for prompt in prompts], dtype=torch.float64)
    p_value = paired_p_value(ours - theirs)
    won = ours.mean() > theirs.mean() and p_value < 1 - confidence
    p_text = "p<0.001" if p_value < 0.001 else f"p={p_value:.3f}"
    verdict = "Stop" if won else "Keep training"
    reason = (
        f"{verdict}: {name} scores {ours.mean():.3f} against {theirs.mean():.3f} of step {t_cut} "
        f"(n={len(prompts)}, {p_text})"
    )
    return Advice(
        "stop" if won else "keep_training",
        name if won else None,
        reason,
        ours.mean().item(),
        theirs.mean().item(),
        len(prompts),
        p_value,
    )
