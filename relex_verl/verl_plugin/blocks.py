"""Blocks of a tensor: what a view, a flat range or another order of its axes has to do with them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from relex_verl.trajectory.shards import Placement

__all__ = ["Box", "Piece", "Shape", "blocks_of_range", "joined", "pieces_of_views", "strides"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it begins along each axis, and how long it is there."""

    start: Shape
    length: Shape

    def __and__(self, other: "Box") -> "Box | None":
        """What two blocks have in common; None for nothing."""
        sides = list(zip(self.start, self.length, other.start, other.length, strict=True))
        start = tuple(max(a, b) for a, _, b, _ in sides)
        length = tuple(min(a + n, b + m) - at for (a, n, b, m), at in zip(sides, start, strict=True))
        return Box(start, length) if all(n > 0 for n in length) else None


@dataclass(frozen=True)
class Piece:
    """A tensor that is a block of a parameter, its axes in another order perhaps.

    Attributes:
        name, shape: of the tensor.
        box: the block of the parameter.
        axes: for each axis of the tensor the parameter's.
    """

    name: str
    shape: Shape
    box: Box
    axes: Shape

    def of(self, box: Box) -> tuple[Shape, Shape]:
        """Where a block of the parameter, which lies within this one, begins in the tensor, and how long it is there."""
        start = tuple(box.start[axis] - self.box.start[axis] for axis in self.axes)
        return start, tuple(box.length[axis] for axis in self.axes)


def pieces_of_views(parameter: torch.Tensor, views: Iterable[tuple[str, torch.Tensor]]) -> tuple[Piece, ...]:
    """What blocks of a tensor its views are.

    Args:
        parameter: contiguous, from the start of its storage.
        views: name and view of each.

    Raises:
        ValueError: one is no view of it, or no block.
    """
    storage = parameter.untyped_storage()._cdata
    pieces = []
    for name, view in views:
        if view.untyped_storage()._cdata != storage:
            raise ValueError(f"{name} is computed anew")
        axes: list[int] = []
        for size, step in zip(view.shape, view.stride(), strict=True):
            free = [axis for axis in range(parameter.ndim) if axis not in axes]
            fits = [axis for axis in free if parameter.stride(axis) == step and parameter.shape[axis] >= size > 1]
            axes += (fits or (free if size == 1 else []))[:1]
        if len(axes) != view.ndim:
            raise ValueError(f"{name} is no block of it")
        rest, start = view.storage_offset(), []
        for step in parameter.stride():
            start.append(rest // step)
            rest %= step
        length = [view.shape[axes.index(axis)] if axis in axes else 1 for axis in range(parameter.ndim)]
        if any(at + n > full for at, n, full in zip(start, length, parameter.shape, strict=True)):
            raise ValueError(f"{name} is no block of it")
        pieces.append(Piece(name, tuple(view.shape), Box(tuple(start), tuple(length)), tuple(axes)))
    return tuple(pieces)


def strides(shape: Sequence[int]) -> Shape:
    """Of a contiguous tensor."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def blocks_of_range(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The blocks that the flat range [start, stop) of a tensor consists of, in its order."""
    if start == 0 and stop == prod(shape):
        yield Box((0,) * len(shape), shape)
        return
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows are [first, last)
    if first > last:  # within one row
        yield from _within(last, shape, start, stop)
        return
    if start < first * inner:
        yield from _within(first - 1, shape, start, first * inner)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * inner < stop:
        yield from _within(last, shape, last * inner, stop)


def _within(row: int, shape: Shape, start: int, stop: int) -> Iterator[Box]:
    inner = prod(shape[1:])
    for box in blocks_of_range(shape[1:], start - row * inner, stop - row * inner):
        yield Box((row, *box.start), (1, *box.length))


def joined(runs: Iterable[tuple[int, int]]) -> Placement:
    """Runs, those that follow one another as one."""
    together: list[list[int]] = []
    for start, length in runs:
        if together and sum(together[-1]) == start:
            together[-1][1] += length
        else:
            together.append([start, length])
    return Placement(tuple(start for start, _ in together), tuple(length for _, length in together))
