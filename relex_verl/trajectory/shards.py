"""One rank's part of one Hugging Face tensor, and where it lies: the contract between engines and everything else.

However an engine cuts its weights (FSDP rows, tensor-parallel columns, fused projections, expert stacks), a rank's part of
a Hugging Face tensor is a list of contiguous runs of that tensor's flat (row-major) index space. That one form serves
reading a base checkpoint, writing a predicted one, and counting every element once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

__all__ = [
    "Placement",
    "ShardSource",
    "TensorShard",
    "block_placement",
    "check_cover",
    "placement_of_positions",
    "share_out",
    "whole",
]


@dataclass(frozen=True)
class Placement:
    """Where a flat shard lies in its full tensor: run i holds full[full_start[i] : full_start[i] + length[i]].

    The runs stand in the shard one after the other, so the shard has sum(length) elements.
    """

    full_start: tuple[int, ...]
    length: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the shard."""
        return sum(self.length)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(start in the shard, start in the full tensor, length) of each run."""
        local = 0
        for start, length in zip(self.full_start, self.length, strict=True):
            yield local, start, length
            local += length

    def cut_out_of(self, full: torch.Tensor) -> torch.Tensor:
        """The shard of a full tensor, flat."""
        flat = full.flatten()
        return torch.cat([flat[start : start + length] for _, start, length in self.runs()] or [flat[:0]])


@dataclass(frozen=True)
class TensorShard:
    """One rank's part of one Hugging Face tensor.

    Attributes:
        name: the Hugging Face name, as in the base checkpoint.
        shape: of the full tensor.
        placement: which of its elements these are.
        data: (placement.numel,) the elements, in the order of the runs, on any device.
    """

    name: str
    shape: tuple[int, ...]
    placement: Placement
    data: torch.Tensor


class ShardSource(Protocol):
    """What observation needs of a training engine; implemented over verl's exporters, and by plain tensors in tests.

    Iterating yields this rank's shards in bfloat16, in the same order at every call. Replicas may be yielded by several
    ranks (the observer counts each element once), a tied tensor by its own name only. Iterating may be a collective
    operation: all ranks iterate, to the end.
    """

    def __iter__(self) -> Iterator[TensorShard]: ...


def whole(shape: Iterable[int]) -> Placement:
    """The placement of an unsharded tensor."""
    return Placement((0,), (prod(shape),))


def block_placement(
    local_shape: tuple[int, ...], global_offset: tuple[int, ...], full_shape: tuple[int, ...]
) -> Placement:
    """The runs of the block full[o0:o0+l0, o1:o1+l1, ...], neighbours joined (a cut along dim 0 is one run).

    Args:
        local_shape: (l0, l1, ...).
        global_offset: (o0, o1, ...).
        full_shape: of the whole tensor.

    Raises:
        ValueError: the block does not lie within the tensor.
    """
    for offset, local, full in zip(global_offset, local_shape, full_shape, strict=True):
        if local and not 0 <= offset <= offset + local <= full:
            raise ValueError(f"block {local_shape} at {global_offset} does not lie within {full_shape}")
    if prod(local_shape) == 0:
        return Placement((), ())
    # The trailing dimensions that are whole are contiguous; the first cut one ends a run.
    cut = max((d for d in range(len(full_shape)) if local_shape[d] != full_shape[d]), default=0)
    stride = [prod(full_shape[d + 1 :]) for d in range(len(full_shape))]
    starts = torch.zeros(1, dtype=torch.int64)
    for d in range(cut):
        along = (torch.arange(local_shape[d]) + global_offset[d]) * stride[d]
        starts = (starts.unsqueeze(1) + along).flatten()
    if full_shape:
        starts = starts + global_offset[cut] * stride[cut]
    run = prod(local_shape[cut:])
    return Placement(tuple(starts.tolist()), (run,) * len(starts))


def placement_of_positions(positions: torch.Tensor) -> Placement:
    """The runs of an explicit list of flat positions, in the order given; neighbours joined.

    Args:
        positions: (n,) int64 flat positions in the full tensor, each once.
    """
    if not positions.numel():
        return Placement((), ())
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    first = torch.cat([breaks.new_zeros(1), breaks])
    last = torch.cat([breaks, breaks.new_tensor([positions.numel()])])
    return Placement(tuple(positions[first].tolist()), tuple((last - first).tolist()))


def share_out(
    everyone: Sequence[Sequence[tuple[str, tuple[int, ...], Placement]]],
) -> list[dict[str, tuple[tuple[int, ...], Placement]]]:
    """Who counts what: of the ranks that hold the same elements of a tensor one does, in turn over the tensors.

    Args:
        everyone: for each rank the name, shape and placement of every shard that it holds.

    Returns:
        For each rank its own name -> (shape, placement).
    """
    claims: dict[tuple[str, Placement], list[int]] = {}
    for rank, shards in enumerate(everyone):
        for name, _, placement in shards:
            if placement.numel:
                claims.setdefault((name, placement), []).append(rank)
    owner = {claim: ranks[i % len(ranks)] for i, (claim, ranks) in enumerate(claims.items())}
    return [
        {
            name: (shape, placement)
            for name, shape, placement in shards
            if placement.numel and owner[name, placement] == rank
        }
        for rank, shards in enumerate(everyone)
    ]


def check_cover(counted: Sequence[Mapping[str, tuple[tuple[int, ...], Placement]]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors, after checking that every element is counted once.

    Args:
        counted: from `share_out`.

    Raises:
        ValueError: shards that overlap or leave a gap.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    runs: dict[str, list[tuple[int, int]]] = {}
    for shards in counted:
        for name, (shape, placement) in shards.items():
            shapes[name] = shape
            runs.setdefault(name, []).extend((start, start + length) for _, start, length in placement.runs())
    for name, shape in shapes.items():
        end = 0
        for start, stop in sorted(runs[name]):
            if start != end:
                raise ValueError(f"{name}: the ranks' shards overlap or leave a gap at element {min(start, end)}")
            end = stop
        if end != torch.Size(shape).numel():
            raise ValueError(f"{name}: the ranks' shards end at element {end} of {torch.Size(shape).numel()}")
    return dict(sorted(shapes.items()))
