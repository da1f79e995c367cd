"""Predictions that are linear in the deltas, from weight vectors that are already known."""

from collections.abc import Iterator

import torch

from relex_verl import replay
from relex_verl.shards import TensorShard
from relex_verl.trajectory import Trajectory

__all__ = ["weighted_tensors"]


def weighted_tensors(trajectory: Trajectory, cut: int, weights_LT: torch.Tensor) -> Iterator[TensorShard]:
    """theta_0 + sum_t a_t delta_t of every shard, computed as in `prediction.predicted_tensors`; one shard in memory.

    Args:
        trajectory: an open trajectory.
        cut: last observed step that takes part.
        weights_LT: a, (L, T), one row a tensor in the order of `trajectory.names`, one column a step up to the cut.

    Raises:
        ValueError: weights of another shape.
    """
    expected = (len(trajectory.names), len(trajectory.steps_until(cut)))
    if tuple(weights_LT.shape) != expected:
        raise ValueError(f"need weights of shape {expected}, got {tuple(weights_LT.shape)}")
    encoding = trajectory.row_encoding()
    coefficients_LT = encoding.coefficients(weights_LT, trajectory.steps_until(cut))
    coefficients = dict(zip(trajectory.names, coefficients_LT.tolist(), strict=True))
    for history in replay.histories(trajectory, cut):
        data = encoding.accumulate(history.anchor, history.parts, coefficients[history.name])
        yield TensorShard(history.name, history.shape, history.placement, data)
