"""From a weight vector to predicted weights, and to a checkpoint on disk: the same code in the run and after it."""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from relex_verl.maths.extrapolators import Prediction, fit_weights
from relex_verl.maths.window import Window
from relex_verl.pipeline.collectives import Collectives
from relex_verl.trajectory import replay
from relex_verl.trajectory.alone import remove_left_behind
from relex_verl.trajectory.checkpoint_writer import CheckpointWriter
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.kinds import Kind
from relex_verl.trajectory.replay import ShardHistory
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = [
    "extrapolate",
    "predicted_tensors",
    "weighted_tensors",
    "write_checkpoint",
    "write_laid_out_like",
    "write_together",
]


def predicted_tensors(
    histories: Iterable[ShardHistory],
    kind: Kind,
    window: Window,
    prediction: Prediction,
    dtype: torch.dtype | None = None,
) -> Iterator[TensorShard]:
    """theta_hat of each shard, theta_0 + sum_t a_t delta_t, summed over what its kind of trajectory keeps.

    Args:
        histories: shards with all that is kept of the window's steps.
        kind: how it is kept.
        window: the rows.
        prediction: the method, its rank and the target.
        dtype: see `weighted_tensors`.

    Raises:
        ValueError: a method that needs single rows, from a sketch; too few rows.
    """
    kind.check(prediction, window.steps)
    yield from weighted_tensors(histories, kind, window, fit_weights(window, prediction), dtype)


def weighted_tensors(
    histories: Iterable[ShardHistory],
    kind: Kind,
    window: Window,
    weights_LT: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> Iterator[TensorShard]:
    """theta_0 + sum_t a_t delta_t of each shard, one in memory.

    Args:
        histories: shards with all that is kept of the window's steps.
        kind: how it is kept.
        window: the rows; only its names and steps are used.
        weights_LT: a, one row a tensor.
        dtype: to round to; the type in which the base stores the tensor for None.

    Raises:
        ValueError: weights of another shape.
    """
    wanted = (len(window.names), window.rows)
    if tuple(weights_LT.shape) != wanted:
        raise ValueError(f"need weights of shape {wanted}, got {tuple(weights_LT.shape)}")
    coefficients = kind.coefficients_of(window.names, weights_LT, window.steps)
    for shard in histories:
        fit = (shard.anchor, shard.parts, coefficients[shard.name], dtype or shard.dtype)
        data = kind.of(shard.name).accumulate(*fit)
        yield TensorShard(shard.name, shard.shape, shard.placement, data)


def write_together(
    ranks: Collectives,
    base: BaseCheckpoint,
    aliases: Mapping[str, str],
    names: Collection[str],
    shards: Iterable[TensorShard],
    folder: Path,
    provenance: Mapping[str, Any],
    followed: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint with all ranks: each puts its own elements into the shared files.

    Args:
        ranks: all of them.
        base: whose layout to take.
        aliases: tied name -> the name that it shares its elements with.
        names: of the tensors that the ranks fill.
        shards: this rank's.
        folder: the destination.
        provenance: for `relex.json`.
        followed: the type of the trajectory's states, see `BaseCheckpoint.in_own_type`.

    Raises:
        PeerError: another rank failed; nothing half-written stays.
    """
    with ranks.together():
        writer = CheckpointWriter(base, folder, set(names), aliases, followed=followed)
    try:
        with ranks.together():
            if ranks.rank == 0:
                writer.begin()
        with ranks.together():
            for shard in shards:
                writer.write(shard)
        with ranks.together():
            if ranks.rank == 0:
                writer.commit(provenance)
    except Exception:
        if ranks.rank == 0:
            shutil.rmtree(writer.partial, ignore_errors=True)
        raise
    return folder


def write_checkpoint(
    trajectory: Trajectory,
    shards: Iterable[TensorShard],
    folder: Path,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda elements: None,
) -> Path:
    """Write a checkpoint of a trajectory from one process, laid out like its base.

    Args:
        trajectory: whose base, names and aliases to take.
        shards: every shard of every rank.
        folder: the destination.
        provenance: for `relex.json`.
        dtype: of all observed tensors; None for that in which the base stores each.
        progress: called with the number of elements of each shard written.
    """
    base, kind = trajectory.base(), trajectory.kind
    if dtype is None:
        shards = (base.in_own_type(shard, kind.of(shard.name).dtype) for shard in shards)
    writer = CheckpointWriter(
        base, folder, set(trajectory.names), trajectory.index.aliases, dtype, beside=trajectory.files
    )
    return _written(writer, shards, provenance, progress)


def write_laid_out_like(
    base: BaseCheckpoint,
    names: Collection[str],
    tensors: Iterable[TensorShard],
    folder: Path,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint with other values for some of a base's tensors, from one process.

    Args:
        base: whose layout and other tensors to take.
        names: of the tensors that have other values.
        tensors: those, or their shards.
        folder: the destination.
        provenance: for `relex.json`.
    """
    return _written(CheckpointWriter(base, folder, set(names), {}), tensors, provenance, lambda elements: None)


def _written(
    writer: CheckpointWriter,
    shards: Iterable[TensorShard],
    provenance: Mapping[str, Any] | None,
    progress: Callable[[int], None],
) -> Path:
    remove_left_behind(writer.folder.parent)
    try:
        writer.begin()
        for shard in shards:
            writer.write(shard)
            progress(shard.placement.numel)
        return writer.commit(provenance)
    except BaseException as error:
        if not isinstance(error, FileExistsError):  # another's
            shutil.rmtree(writer.partial, ignore_errors=True)  # nothing half-written stays
        raise


def extrapolate(trajectory: Trajectory, cut: int, prediction: Prediction) -> Iterator[TensorShard]:
    """The prediction from the steps up to `cut`, from disk alone; the same bits as in the run.

    Raises:
        TrajectoryError: too few steps up to the cut.
    """
    window, histories = replay.window(trajectory, cut), replay.histories(trajectory, cut)
    return predicted_tensors(histories, trajectory.kind, window, prediction)
