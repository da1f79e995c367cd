"""Weight Extrapolation as its authors run it: a line through two checkpoints, norm layers copied from the later one.

Wang et al. 2026, "Not All Steps are Informative: On the Linearity of LLMs' RLVR Training",
https://arxiv.org/abs/2601.04537, code https://github.com/Miaow-Lab/RLVR-Linearity.
The method `two-point` of `extrapolators.METHODS` is this with the origin as the first checkpoint and no copies.
"""

import re
from collections.abc import Iterator, Sequence

import torch

from relex_verl.pipeline.prediction import weighted_tensors
from relex_verl.trajectory import replay
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = ["is_norm", "two_point_factor", "weight_extrapolation", "weight_extrapolation_weights"]

NORM = re.compile(r"norm|ln_", re.IGNORECASE)


def is_norm(name: str) -> bool:
    """Whether the authors' code takes a tensor for part of a norm layer: by its name."""
    return NORM.search(name) is not None


def two_point_factor(first: float, last: float, target: float) -> float:
    """a = (target - first) / (last - first), over real training steps.

    Raises:
        ValueError: `last` is not after `first`.
    """
    if last <= first:
        raise ValueError(f"the second checkpoint (step {last}) has to be later than the first (step {first})")
    return (target - first) / (last - first)


def weight_extrapolation_weights(
    names: Sequence[str], steps: Sequence[int], first: int, target: float, copy_norms: bool = True, origin: int = 0
) -> torch.Tensor:
    """The weights a over the deltas: (1 - a) at `first` (nothing if that is the origin) and a at the last step.

    W_first + a (W_last - W_first) = W_0 + (1 - a) delta_first + a delta_last; where a norm is copied, W_0 + delta_last.

    Args:
        names: of the L tensors.
        steps: the T observed steps; the last is the second checkpoint.
        first: step of the first checkpoint, the origin or an observed one.
        target: step to predict.
        copy_norms: keep the last observed values of norm layers.
        origin: the step of theta_0.

    Returns:
        (L, T) float64.

    Raises:
        ValueError: `first` is not before the last step.
        TrajectoryError: `first` was not observed.
    """
    factor = two_point_factor(first, steps[-1], target)
    if first != origin and first not in steps:
        raise TrajectoryError(f"step {first} was not observed; there are {origin} (the origin) and {list(steps)}")
    moved_T = torch.zeros(len(steps), dtype=torch.float64)
    moved_T[-1] = factor
    if first != origin:
        moved_T[list(steps).index(first)] = 1.0 - factor
    held_T = torch.zeros(len(steps), dtype=torch.float64)
    held_T[-1] = 1.0
    return torch.stack([held_T if copy_norms and is_norm(name) else moved_T for name in names])


def weight_extrapolation(
    trajectory: Trajectory, cut: int, target: int, first: int | None = None, copy_norms: bool = True
) -> Iterator[TensorShard]:
    """W_first + a (W_last - W_first) with a = (target - first) / (last - first), `last` the last observed step up to `cut`.

    Args:
        trajectory: an open trajectory.
        cut: no step after this one is used.
        target: step to predict.
        first: step of the first checkpoint; None for the origin.
        copy_norms: as the authors' code does, keep the last observed values of norm layers.

    Yields:
        Every shard, in the base's types, computed in float64.

    Raises:
        ValueError: `first` is not before the last observed step.
        TrajectoryError: `first` was not observed, or nothing was up to the cut.
    """
    trajectory.row_codec()
    window = replay.window(trajectory, cut)
    start = window.origin_step if first is None else first
    weights_LT = weight_extrapolation_weights(window.names, window.steps, start, target, copy_norms, window.origin_step)
    return weighted_tensors(replay.histories(trajectory, cut), trajectory.kind, window, weights_LT)
