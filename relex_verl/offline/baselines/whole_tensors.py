"""Whole tensors of a trajectory at its observed steps, one tensor at a time, however the ranks had cut them.

What is linear in the deltas works on any shard (`weighted`); an SVD of a weight matrix needs the matrix.
"""

import re
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch

from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.origin import Origin
from relex_verl.trajectory.shards import Placement, TensorShard, whole
from relex_verl.trajectory.store import Trajectory

__all__ = ["WholeTensors", "is_attention_or_mlp_matrix"]

BLOCK = re.compile(r"\.(self_attn|self_attention|attention|attn|mlp|feed_forward)\.")


def is_attention_or_mlp_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a 2-D weight inside an attention or MLP block: what AlphaRL and LoRA (so NExt) change.

    Embeddings, the head, norms and biases are not.
    """
    return len(shape) == 2 and BLOCK.search(name) is not None


class _Rank(NamedTuple):
    placements: dict[str, Placement]
    position: dict[str, int]  # of each of its tensors in its files
    packed: list[Any]  # its files, memory-mapped, one a step
    origin: Origin  # its part of theta_0


class WholeTensors:
    """Reads one whole tensor at a time from a trajectory.

    Attributes:
        trajectory: the trajectory.
        origin_step: the step of theta_0.
        steps: the T observed steps up to the cut, ascending; without the origin.
        shapes: name -> shape of every tensor.
    """

    def __init__(self, trajectory: Trajectory, cut: int | None = None) -> None:
        """Open the files of every rank.

        Args:
            trajectory: an open trajectory.
            cut: last step to see; None for all.

        Raises:
            TrajectoryError: no step up to the cut, or a file is missing.
        """
        trajectory.row_codec()  # a sketch has no single steps
        self.trajectory, self.origin_step = trajectory, trajectory.record.origin_step
        self.steps = trajectory.steps_until(cut)
        self.shapes = {name: tuple(shape) for name, shape in trajectory.index.tensors.items()}
        self._base = trajectory.base()
        self._ranks = [self._open(rank) for rank in range(trajectory.index.world_size)]

    def _open(self, rank: int) -> _Rank:
        placements = self.trajectory.placements(rank)
        packed = [self.trajectory.load(rank, step) for step in self.steps]
        origin = self.trajectory.origin(rank, self._base, placements)
        return _Rank(placements, {name: i for i, name in enumerate(placements)}, packed, origin)

    def states(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """theta_t of one tensor at the origin and at every observed step, in order: (step, tensor of its full shape).

        Each tensor is a new one, in the kind's dtype. Memory: two copies of the tensor, besides what the caller keeps.
        """
        holders = [rank for rank in self._ranks if name in rank.placements]
        pieces = [rank.origin[name].clone() for rank in holders]  # they may be views of a memory-mapped file
        yield self.origin_step, self._joined(name, holders, pieces)
        for t, step in enumerate(self.steps):
            for rank, piece in zip(holders, pieces, strict=True):
                self.trajectory.row_codec(name).advance(piece, rank.packed[t].increment(rank.position[name]))
            yield step, self._joined(name, holders, pieces)

    def state(self, name: str, step: int) -> torch.Tensor:
        """theta_t of one tensor at the origin or an observed step, in its full shape.

        Raises:
            TrajectoryError: the step was not observed, or lies beyond the cut.
        """
        for at, tensor in self.states(name):
            if at == step:
                return tensor
        raise TrajectoryError(f"step {step} is not among the observed ones up to the cut: {self.steps}")

    def shard(self, name: str, tensor: torch.Tensor) -> TensorShard:
        """A whole tensor as what `prediction.write_checkpoint` takes."""
        return TensorShard(name, self.shapes[name], whole(self.shapes[name]), tensor.flatten())

    def _joined(self, name: str, holders: list[_Rank], pieces: list[torch.Tensor]) -> torch.Tensor:
        full = torch.empty(prod(self.shapes[name]), dtype=self.trajectory.kind.of(name).dtype)
        for rank, piece in zip(holders, pieces, strict=True):
            for local, start, length in rank.placements[name].runs():
                full[start : start + length] = piece[local : local + length]
        return full.view(self.shapes[name])
