"""Which horizon to score next: a bracketed search along the predicted line, on a logarithmic scale.

Score against horizon rises from the last observed step, peaks, and collapses; only measuring tells where. The search sees
scores and steps only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import TypeVar

from relex_verl.maths.extrapolators import METHODS

__all__ = ["MAX_HORIZON", "Candidate", "contenders", "next_target", "screen", "search"]

Name = TypeVar("Name")

# The paper goes to 20 times the prefix. Beyond this many the line has left the data behind.
MAX_HORIZON = 25.0
# Beyond these the window itself speaks against v1.
MOST_DRIFT = 0.6
LEAST_AGREEMENT = 0.05
# Two horizons closer than this ratio are not told apart by a few hundred prompts.
FINEST_RATIO = 1.2


@dataclass(frozen=True)
class Candidate:
    """One prediction that was scored.

    Attributes:
        method, target: what was predicted.
        score: on the half of the validation prompts that the search may see.
    """

    method: str
    target: int
    score: float


def screen(backtests: Mapping[str, float], drift: float, agreement: float) -> tuple[list[str], dict[str, str]]:
    """Order the methods by their backtest and leave out those that the window itself speaks against.

    One is always kept: only a score can tell that none works.

    Args:
        backtests: method -> error of predicting the last row from the first half, against holding (1 is no better).
        drift: 1 - |cos| of v1 between the first half of the rows and all, mean over the tensors.
        agreement: |cos| of v1 between the two halves taken apart, mean over the tensors.

    Returns:
        Methods to score, best first; method -> why it was left out.
    """
    order = sorted(backtests, key=lambda method: (backtests[method] != backtests[method], backtests[method]))
    reasons: dict[str, str] = {}
    for method in order[1:]:
        error = backtests[method]
        if error >= 1.0 and METHODS[method].step_axis:
            reasons[method] = f"in the backtest it misses by {error:.2f} times what holding the weights misses"
        elif METHODS[method].along_v1 and drift > MOST_DRIFT:
            reasons[method] = (
                f"v1 is not settled: it turned by 1 - |cos| = {drift:.2f} since the first half of the window"
            )
        elif METHODS[method].along_v1 and agreement < LEAST_AGREEMENT:
            reasons[method] = f"the two halves of the window disagree on v1 (|cos| = {agreement:.2f})"
    return [method for method in order if method not in reasons], reasons


def next_target(
    tried: Mapping[int, float],
    targets: Sequence[int],
    t_cut: int,
    hold: float,
    margin: float = 0.0,
    origin_step: int = 0,
    nearest: float = 1.0,
) -> int | None:
    """The next step to predict and score for one method; None when the search is done.

    First the configured targets, in ascending order, until the score falls. Then, if the best is the farthest, twice as
    far; else the geometric middle of the wider gap beside the best.

    Args:
        tried: target -> score.
        targets: configured targets, all after the cut.
        t_cut: the last observed step.
        hold: score of the last observed weights, the first point of the curve.
        margin: a smaller drop below the best is noise and does not count as a fall.
        origin_step: where the line starts; horizons are measured from there.
        nearest: no target is looked for below this many windows.
    """
    curve = {t_cut: hold, **tried}
    steps = sorted(curve)
    best = max(steps, key=lambda step: (curve[step], -step))
    farthest = steps[-1]
    ahead = [target for target in sorted(targets) if target > farthest]
    if ahead and curve[farthest] >= curve[best] - margin:
        return ahead[0]
    if best == farthest:
        twice = 2 * best - origin_step
        return twice if twice - origin_step <= MAX_HORIZON * (t_cut - origin_step) else None
    place = steps.index(best)
    gaps = list(zip(steps[max(0, place - 1) :], steps[max(0, place - 1) + 1 : place + 2], strict=False))
    low, high = max(((low - origin_step, high - origin_step) for low, high in gaps), key=lambda gap: gap[1] / gap[0])
    middle = origin_step + round(sqrt(low * high))
    too_near = middle - origin_step < nearest * (t_cut - origin_step)
    return middle if high / low >= FINEST_RATIO**2 and middle not in curve and not too_near else None


def search(
    score: Callable[[str, int], float],
    methods: Sequence[str],
    targets: Sequence[int],
    t_cut: int,
    hold: float,
    budget: int,
    margin: float = 0.0,
    origin_step: int = 0,
    nearest: float = 1.0,
) -> list[Candidate]:
    """Spend the budget on the methods in turn, each along its own line.

    Args:
        score: (method, target) -> score; called `budget` times at most.
        methods: names, the most promising first.
        targets: configured targets.
        t_cut: the last observed step.
        hold: score of the last observed weights.
        budget: how many predictions may be scored.
        margin, origin_step, nearest: see `next_target`.

    Returns:
        What was scored, in that order.
    """
    tried: dict[str, dict[int, float]] = {method: {} for method in methods}
    scored: list[Candidate] = []
    open_methods = list(methods)
    while open_methods and len(scored) < budget:
        for method in list(open_methods):
            target = next_target(tried[method], targets, t_cut, hold, margin, origin_step, nearest)
            if target is None:
                open_methods.remove(method)
            elif len(scored) < budget:
                tried[method][target] = score(method, target)
                scored.append(Candidate(method, target, tried[method][target]))
    return scored


def contenders(scores: Mapping[Name, Mapping[str, float]]) -> list[Name]:
    """Which candidates the prompts so far do not tell from the best: within a standard error of the paired difference.

    A round of successive halving (Jamieson and Talwalkar, arXiv:1502.07943) in which the spread, not a share, decides who
    goes on: where one is far ahead no more prompts are spent.

    Args:
        scores: candidate -> prompt -> score, on the same prompts.

    Returns:
        The best first; of equal ones the one that came first.
    """
    means = {name: fmean(of.values()) for name, of in scores.items()}
    order = sorted(means, key=lambda name: -means[name])
    left = []
    for name in order:
        behind = [score - scores[name][prompt] for prompt, score in scores[order[0]].items()]
        error = stdev(behind) / sqrt(len(behind)) if len(behind) > 1 else 0.0
        if fmean(behind) <= error:
            left.append(name)
    return left
