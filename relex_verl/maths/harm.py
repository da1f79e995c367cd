"""Whether training may go on from a prediction: a protection against harm, not against chance gains.

A jump that gains nothing costs nothing, since training goes on from it; one that harms costs the steps that made the
difference. So a candidate that won the search is taken unless the other half of the prompts speaks against it, and is taken
back if what was trained from it falls behind the weights before it. Both are one-sided paired tests of "it is worse"
(`advice.paired_p_value`): a candidate that is exactly as good is refused in a share 1 - confidence of all cases.
"""

from dataclasses import replace

import torch

from relex_verl.maths.advice import Advice, Scores, decides, paired_p_value, paired_scores, unscored
from relex_verl.maths.extrapolators import Prediction

__all__ = ["judge_distance", "judge_jump", "judge_undo", "token_kl"]


def token_kl(before_N: torch.Tensor, after_N: torch.Tensor) -> torch.Tensor:
    """KL(before || after) of the next token's distribution, estimated at each of N tokens that `before` drew.

    k3 of http://joschu.net/blog/kl-approx.html: with log r = after - before, r - 1 - log r. Unbiased, since the mean of
    r - 1 is 0, and never below 0, so that 0 is said of equal policies only.

    Args:
        before_N, after_N: log-probabilities of the drawn tokens by both policies, float64.

    Returns:
        (N,) nats. Their mean is the mean token KL.
    """
    log_ratio_N = after_N - before_N
    return torch.expm1(log_ratio_N) - log_ratio_N


def judge_distance(advice: Advice, kl: float, most: float) -> Advice:
    """A jump that leads too far from the policy is refused, whatever it scores.

    Args:
        advice: "jump".
        kl: mean token KL between the policy before and after, in nats; NaN where it could not be told.
        most: that a jump may have.
    """
    said = f"token KL {kl:.3g} of {most:g} allowed"
    if kl <= most:
        return replace(advice, reason=f"{advice.reason}, {said}", kl=kl)
    reason = f"Keep training: too far from the policy ({said}); {advice.reason.removeprefix('Jump: ')}"
    return replace(advice, action="keep_training", target=None, reason=reason, kl=kl)


def judge_jump(prediction: Prediction, candidate: Scores, hold: Scores, t_cut: int, confidence: float) -> Advice:
    """Jump or train on: it must win on the half that the search saw, and not be worse on the other.

    Args:
        prediction: the search's winner.
        candidate: its scores.
        hold: those of the last observed weights.
        t_cut: the last observed step.
        confidence: of the test of harm; the higher, the less is refused.

    Returns:
        Advice "jump" or "keep_training"; `score` and `hold_score` are of the deciding half, `p_value` that of harm, and no
        `alpha`, since it is not to fall below one.
    """
    searched = paired_scores(candidate, hold, lambda prompt: not decides(prompt))
    deciding = paired_scores(candidate, hold, decides)
    if not len(deciding.ours_N):
        return unscored("no validation prompt was scored with both weights")
    won = float(searched.ours_N.mean()) > float(searched.theirs_N.mean()) if len(searched.ours_N) else False
    harm = paired_p_value(deciding.theirs_N - deciding.ours_N)
    worse = harm < 1 - confidence
    ours, theirs = float(deciding.ours_N.mean()), float(deciding.theirs_N.mean())
    said = f"{prediction.folder_name} scores {ours:.3f} against {theirs:.3f} of step {t_cut} (n={len(deciding.ours_N)}"
    if won and not worse:
        reason = f"Jump: {said}, p={harm:.3f} of harm)"
    elif won:
        reason = f"Keep training: {said}, p={harm:.3f} of harm; {1 - confidence:.2g} or more needed)"
    else:
        reason = f"Keep training: {said}), and does not win on the half that the search saw"
    jump = won and not worse
    action, target = ("jump", prediction) if jump else ("keep_training", None)
    return Advice(action, target, reason, ours, theirs, len(deciding.ours_N), harm)


def judge_undo(now: Scores, before: Scores, t_cut: int, jumped_at: int, confidence: float) -> Advice | None:
    """Whether what was trained from a jump has fallen behind the weights before it, on all prompts.

    Args:
        now: scores of the last observed weights.
        before: scores of the weights from which the jump was made.
        t_cut: the last observed step.
        jumped_at: the step of the jump.
        confidence: as for the jump.

    Returns:
        Advice "undo", or None where they have not.
    """
    pairs = paired_scores(now, before, lambda prompt: True)
    if not len(pairs.ours_N):
        return None
    harm = paired_p_value(pairs.theirs_N - pairs.ours_N)
    ours, theirs = float(pairs.ours_N.mean()), float(pairs.theirs_N.mean())
    if ours >= theirs or harm >= 1 - confidence:
        return None
    reason = (
        f"Undo: step {t_cut} scores {ours:.3f}, behind the {theirs:.3f} that step {jumped_at} had before the jump "
        f"(n={len(pairs.ours_N)}, p={harm:.3f})"
    )
    return Advice("undo", None, reason, ours, theirs, len(pairs.ours_N), harm)
