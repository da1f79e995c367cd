"""From a weight vector to predicted weights, and to a checkpoint on disk: the same code in the run and after it."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from relex_verl.maths.extrapolators import METHODS, Prediction, fit_weights
from relex_verl.trajectory import replay
from relex_verl.trajectory.encodings import Encoding, SketchEncoding
from relex_verl.trajectory.hf_checkpoint import CheckpointWriter
from relex_verl.trajectory.replay import ShardHistory
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = ["check_method", "extrapolate", "predicted_tensors", "weighted_tensors", "write_checkpoint"]


def check_method(encoding: Encoding, prediction: Prediction, steps: Sequence[int]) -> None:
    """Refuse what a sketch cannot give: it knows the steps' polynomials, no single one of them.

    Raises:
        ValueError: with the cure.
    """
    if not isinstance(encoding, SketchEncoding):
        return
    method, rank, fit_from = prediction.method, prediction.rank, prediction.fit_from
    fitting = [name for name, known in METHODS.items() if known.degree is not None and known.degree < encoding.size]
    if method not in fitting:
        raise ValueError(
            f"{method} cannot be predicted from a sketch of size {encoding.size}: use {', '.join(fitting)}"
        )
    if rank > encoding.size:
        raise ValueError(f"rank {rank} is more than a sketch of size {encoding.size} holds")
    if fit_from > steps[0]:
        raise ValueError(f"fit_from {fit_from}: a sketch cannot leave out steps that it holds, the first is {steps[0]}")


def predicted_tensors(
    histories: Iterable[ShardHistory],
    encoding: Encoding,
    names: Sequence[str],
    gram_LTT: torch.Tensor,
    steps: Sequence[int],
    prediction: Prediction,
) -> Iterator[TensorShard]:
    """theta_hat of each shard, theta_0 + sum_t a_t delta_t, summed over what its encoding keeps.

    Args:
        histories: shards with all that is kept of `steps`.
        encoding: how it is kept.
        names: of the tensors, in the order of the stack.
        gram_LTT: G, (L, T, T).
        steps: the T real step numbers.
        prediction: the method, its rank and the target.

    Raises:
        ValueError: a method that needs single rows, from a sketch.
    """
    method, target, rank, fit_from = prediction.method, prediction.target, prediction.rank, prediction.fit_from
    check_method(encoding, prediction, steps)
    weights_LT = fit_weights(gram_LTT, steps, target, method, rank, fit_from)
    yield from weighted_tensors(histories, encoding, names, steps, weights_LT)


def weighted_tensors(
    histories: Iterable[ShardHistory],
    encoding: Encoding,
    names: Sequence[str],
    steps: Sequence[int],
    weights_LT: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[TensorShard]:
    """theta_0 + sum_t a_t delta_t of each shard, one in memory.

    Args:
        histories: shards with all that is kept of `steps`.
        encoding: how it is kept.
        names: of the tensors, in the order of the stack.
        steps: the T real step numbers.
        weights_LT: a, one row a tensor.
        dtype: to round to.

    Raises:
        ValueError: weights of another shape.
    """
    if tuple(weights_LT.shape) != (len(names), len(steps)):
        raise ValueError(f"need weights of shape {(len(names), len(steps))}, got {tuple(weights_LT.shape)}")
    coefficients = dict(zip(names, encoding.coefficients(weights_LT, steps).tolist(), strict=True))
    for one in histories:
        data = encoding.accumulate(one.anchor, one.parts, coefficients[one.name], dtype)
        yield TensorShard(one.name, one.shape, one.placement, data)


def write_checkpoint(
    trajectory: Trajectory,
    shards: Iterable[TensorShard],
    folder: Path,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int], None] = lambda elements: None,
) -> Path:
    """Write a checkpoint of a trajectory from one process, laid out like its base.

    Args:
        trajectory: whose base, names and aliases to take.
        shards: every shard of every rank.
        folder: the destination.
        provenance: for `relex.json`.
        dtype: of the weights, bfloat16 or float32.
        progress: called with the number of elements of each shard written.
    """
    writer = CheckpointWriter(trajectory.base(), folder, set(trajectory.names), trajectory.index.aliases, dtype)
    try:
        writer.begin()
        for shard in shards:
            writer.write(shard)
            progress(shard.placement.numel)
        return writer.commit(provenance)
    except BaseException:
        shutil.rmtree(writer.partial, ignore_errors=True)  # nothing half-written stays
        raise


def extrapolate(trajectory: Trajectory, cut: int, prediction: Prediction) -> Iterator[TensorShard]:
    """The prediction from the steps up to `cut`, from disk alone; the same bits as in the run.

    Raises:
        TrajectoryError: too few steps up to the cut.
    """
    steps = trajectory.steps_until(cut)
    gram_LTT = replay.gram(trajectory, cut)
    histories = replay.histories(trajectory, cut)
    return predicted_tensors(histories, trajectory.encoding, trajectory.names, gram_LTT, steps, prediction)
