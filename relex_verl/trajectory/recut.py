"""The files of a window for ranks that cut the weights otherwise than those that wrote it: another number, or engine.

What is exact stays so: bfloat16 changes, float32 changes and the moments of a sketch. Quantised changes are quantised again
in the groups of the new shards, with the error carried on as before, so that no row is off by more than one more quantum.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from relex_verl.trajectory.encodings import Packing
from relex_verl.trajectory.encodings.fitting import check_fits
from relex_verl.trajectory.encodings.moments import Moment
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.kinds import RowCodec
from relex_verl.trajectory.shards import Placement
from relex_verl.trajectory.store import Trajectory

__all__ = ["overlaps", "write_rank"]


def overlaps(one: Placement, other: Placement) -> list[tuple[int, int, int]]:
    """(start in one shard, start in the other, length) of each stretch of elements that two shards of a tensor share."""
    found, runs = [], sorted((full, local, length) for local, full, length in other.runs())
    first = 0
    for full, local, length in sorted((full, local, length) for local, full, length in one.runs()):
        while first < len(runs) and runs[first][0] + runs[first][2] <= full:
            first += 1
        for there, its, size in runs[first:]:
            if there >= full + length:
                break
            start, stop = max(full, there), min(full + length, there + size)
            if stop > start:
                found.append((local + start - full, its + start - there, stop - start))
    return found


@dataclass
class _Piece:
    """What an old rank holds of a new shard.

    Attributes:
        rank: the old one.
        tensor: which of its tensors.
        numel: elements of its shard.
        origin: its theta_0.
        shared: of `overlaps`, the new shard's first.
    """

    rank: int
    tensor: int
    numel: int
    origin: torch.Tensor
    shared: list[tuple[int, int, int]]

    def put(self, there: torch.Tensor, values: torch.Tensor) -> None:
        """Copy what is shared of the old shard's values into the new one's."""
        for new, old, length in self.shared:
            there[new : new + length] = values[old : old + length]


def write_rank(
    window: Trajectory, into: Trajectory, rank: int, placements: Mapping[str, Placement], counts: Collection[str]
) -> None:
    """Write what a rank of the new cut holds of a window: its placements, theta_0 and the file of each step that is kept.

    Args:
        window: as it was written.
        into: the same window in the folder of the new cut.
        rank: the new one.
        placements: what it holds, in its order.
        counts: tensors whose rows of H, which are summed over the ranks, it writes; for the others 0.

    Raises:
        TrajectoryError: what an old rank has written is missing or damaged.
    """
    kind, steps = window.kind, window.steps if window.kind.keeps_rows else window.record.stored
    old = _Old(window, steps)
    packings = [Packing[Any](kind.part) for _ in steps]
    origins = []
    for name, placement in placements.items():
        pieces = old.pieces(name, placement)
        origin = torch.empty(placement.numel, dtype=kind.dtype)
        for piece in pieces:
            piece.put(origin, piece.origin)
        origins.append(origin)
        if kind.rows is not None:
            for packing, increment in zip(packings, _increments(kind.rows, origin, pieces, old), strict=True):
                packing.add(increment)
        else:
            for t, packing in enumerate(packings):
                for moment in _moments(kind.size, placement.numel, pieces, old, t):
                    packing.add(moment)
    into.declare_rank(rank, placements, None if window.record.origin == "base" else torch.cat(origins))
    for t, (step, packing) in enumerate(zip(steps, packings, strict=True)):
        into.append(rank, step, packing.step(old.gram_row(t, list(placements), counts)))


class _Old:
    """The files of all ranks that wrote a window."""

    def __init__(self, window: Trajectory, steps: Sequence[int]) -> None:
        self.window, ranks = window, range(window.index.world_size)
        self.placements = [window.placements(rank) for rank in ranks]
        self.position = [{name: i for i, name in enumerate(held)} for held in self.placements]
        self.files = [[window.stored(rank, step) for step in steps] for rank in ranks]
        base = window.base()
        self.origins = [window.origin(rank, base, held) for rank, held in enumerate(self.placements)]
        self.steps = steps

    def pieces(self, name: str, placement: Placement) -> list[_Piece]:
        """What the old ranks hold of a new shard: all of it."""
        pieces = []
        for rank, held in enumerate(self.placements):
            shared = overlaps(placement, held[name]) if name in held else []
            if shared:
                numel, origin = held[name].numel, self.origins[rank][name]
                pieces.append(_Piece(rank, self.position[rank][name], numel, origin, shared))
        there = sum(length for piece in pieces for _, _, length in piece.shared)
        if there != placement.numel:
            raise TrajectoryError(
                f"{self.window.folder} is damaged: its ranks hold {there} of {placement.numel} elements of {name}"
            )
        return pieces

    def part(self, piece: _Piece, t: int, position: int) -> Any:
        """A part in the file of step t."""
        part = self.files[piece.rank][t].increment(position)
        try:
            check_fits(part, piece.numel, self.window.kind.part)
        except ValueError as error:
            raise TrajectoryError(f"{self.window.rank_folder(piece.rank)} is damaged: {error}") from error
        return part

    def gram_row(self, t: int, names: Sequence[str], counts: Collection[str]) -> torch.Tensor:
        """The new row of H of step t, summed over the old ranks, (l, t); 0 for tensors that another rank counts."""
        position = {name: i for i, name in enumerate(names)}
        total: torch.Tensor | None = None
        for rank, held in enumerate(self.placements):
            row = self.window.load(rank, self.steps[t]).arrays["gram_row"]
            total = torch.zeros(len(names), row.shape[1], dtype=torch.float64) if total is None else total
            for name, mine in zip(held, row, strict=True):
                if name in counts:
                    total[position[name]] += mine
        assert total is not None
        return total


def _increments(codec: RowCodec, origin: torch.Tensor, pieces: Sequence[_Piece], old: _Old) -> Iterator[Any]:
    """Those of a new shard, step by step: the old shards are replayed, and what they share with it is encoded."""
    states, state, now = [piece.origin.clone() for piece in pieces], origin.clone(), torch.empty_like(origin)
    for t in range(len(old.steps)):
        for piece, replayed in zip(pieces, states, strict=True):
            codec.advance(replayed, old.part(piece, t, piece.tensor))
            piece.put(now, replayed)
        increment = codec.encode(state, now)
        codec.advance(state, increment)
        yield increment


def _moments(size: int, numel: int, pieces: Sequence[_Piece], old: _Old, t: int) -> Iterator[Moment]:
    for j in range(size):
        value = torch.empty(numel)
        for piece in pieces:
            piece.put(value, old.part(piece, t, size * piece.tensor + j).value)
        yield Moment(value)
