"""From a weight vector to predicted weights, and to a checkpoint on disk: the same code in the run and after it."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relex_verl.encodings import Encoding
from relex_verl.extrapolators import fit_weights, increment_coefficients
from relex_verl.gram import delta_gram
from relex_verl.hf_checkpoint import CheckpointWriter
from relex_verl.shards import TensorShard
from relex_verl.trajectory import ShardHistory, Trajectory

__all__ = ["Prediction", "extrapolate", "predicted_tensors", "write_checkpoint"]


@dataclass(frozen=True)
class Prediction:
    """What to predict: one method, one target step, from the rows from step `fit_from` on."""

    method: str
    target: int
    rank: int = 1
    fit_from: int = 0

    @property
    def folder_name(self) -> str:
        """Name of its checkpoint folder."""
        return f"{self.method}-step_{self.target}"


def predicted_tensors(
    histories: Iterable[ShardHistory],
    encoding: Encoding,
    names: Sequence[str],
    gram_LTT: torch.Tensor,
    steps: Sequence[int],
    prediction: Prediction,
) -> Iterator[TensorShard]:
    """theta_hat of each shard: theta_last + sum_t (w_t - 1) e_t (DESIGN: one weight vector a tensor, from G alone).

    Args:
        histories: shards with all increments of `steps`.
        encoding: of the increments.
        names: of the tensors, in the order of the stack.
        gram_LTT: G, (L, T, T).
        steps: the T real step numbers.
        prediction: the method, its rank and the target.
    """
    method, target, rank, fit_from = prediction.method, prediction.target, prediction.rank, prediction.fit_from
    weights_LT = fit_weights(gram_LTT, steps, target, method, rank, fit_from)
    coefficients = dict(zip(names, increment_coefficients(weights_LT).tolist(), strict=True))
    for history in histories:
        data = encoding.accumulate(history.last, history.increments, coefficients[history.name])
        yield TensorShard(history.name, history.shape, history.placement, data)


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
    gram_LTT = delta_gram(trajectory.increment_gram(cut))
    histories = trajectory.histories(cut)
    return predicted_tensors(histories, trajectory.encoding, trajectory.names, gram_LTT, steps, prediction)
