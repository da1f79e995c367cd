"""Where an engine's converter puts the elements of a shard, found out by sending marked elements through it.

An engine that stores other tensors than the checkpoint has (Megatron's fused projections, expert stacks) knows how to hand
its elements out as Hugging Face tensors. What it does to a few marked elements of each row says where the row goes: a row of
the shard, its last dimension, comes out in one piece wherever rows are cut, fused, reordered or padded. Where rows do not
stay whole (a transposed weight), each element of a small weight is marked; a large one is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from relex_verl.trajectory.shards import Placement, placement_of_positions

__all__ = ["Part", "converted_parts"]

# bfloat16 has 8 significant bits: whole numbers up to 256 are exact. Digits start at 1, so that none looks like padding.
DIGIT_BASE = 128
# Elements of a weight whose every element may be marked: an index and a run for each take some hundred bytes.
MOST_SINGLE = 1 << 20

Slots = list[tuple[str, tuple[int, ...]]]
# (positions in the shard, their values) -> slots, elements that came out in each, their flat positions there, their values.
Convert = Callable[[torch.Tensor, torch.Tensor], tuple[Slots, torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Part:
    """Which elements of a Hugging Face tensor a part of an engine's shard is.

    Attributes:
        name, shape: of the Hugging Face tensor.
        placement: which of its elements.
        source: where they lie in the shard, in the same order; None: all of it, from front to back.
    """

    name: str
    shape: tuple[int, ...]
    placement: Placement
    source: Placement | None

    def cut_out(self, local: torch.Tensor) -> torch.Tensor:
        """These elements of the shard: a view where they lie together."""
        if self.source is None:
            return local
        pieces = [local[start : start + length] for _, start, length in self.source.runs()]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def put(self, local: torch.Tensor, data: torch.Tensor) -> None:
        """Set these elements of the shard, in place."""
        taken = 0
        for _, start, length in [(0, 0, local.numel())] if self.source is None else self.source.runs():
            local[start : start + length].copy_(data[taken : taken + length])
            taken += length


def converted_parts(convert: Convert, numel: int, row: int) -> list[Part]:
    """The parts of Hugging Face tensors that a shard holds.

    Args:
        convert: the engine's converter.
        numel: elements of the shard.
        row: length of its last dimension.

    Raises:
        ValueError: the converter computes new values instead of moving old ones, or scatters a large weight.
    """
    if not numel:
        return []
    parts = _by_rows(convert, numel // row, row) if row > 1 and numel % row == 0 else None
    if parts is None and numel > MOST_SINGLE:
        raise ValueError(
            f"its {numel} elements are not handed out as they are stored: the rows of {row} do not stay whole"
        )
    return _by_elements(convert, numel) if parts is None else parts


def _by_rows(convert: Convert, rows: int, row: int) -> list[Part] | None:
    """One pass: each row carries its number, in digits at its front, and marks further on.

    Returns:
        The parts; None where rows do not stay whole.
    """
    digits = _digits(rows)
    between = {digits + (row - digits) * i // 5 for i in range(1, 5)}
    offsets_M = torch.tensor(sorted({*range(digits), *between, row - 1} & set(range(row))))
    if row < digits + 1:
        return None
    number_R = torch.arange(rows)
    marks_RM = 129 + (number_R.unsqueeze(1) * 7 + offsets_M) % 127  # no digit, and another in each place of a row
    for i in range(digits):
        marks_RM[:, i] = number_R // DIGIT_BASE**i % DIGIT_BASE + 1
    positions = (number_R.unsqueeze(1) * row + offsets_M).flatten()
    slots, counts, index, value = convert(positions, marks_RM.flatten().to(torch.bfloat16))
    parts, seen = [], torch.zeros(rows, dtype=torch.bool)
    for (name, shape), at, marks in zip(slots, index.split(counts.tolist()), value.split(counts.tolist()), strict=True):
        if not at.numel():
            continue
        if at.numel() % len(offsets_M):
            return None
        at, order = at.sort()
        at_NM, marks_NM = at.view(-1, len(offsets_M)), marks[order].view(-1, len(offsets_M))
        number_N = sum((marks_NM[:, i] - 1) * DIGIT_BASE**i for i in range(digits))
        if not bool(((at_NM - at_NM[:, :1]) == offsets_M).all()) or not bool(
            ((number_N >= 0) & (number_N < rows)).all()
        ):
            return None
        if not torch.equal(marks_NM, marks_RM[number_N]) or bool(seen[number_N].any()):
            return None
        seen[number_N] = True
        parts.append(Part(name, tuple(shape), _joined(at_NM[:, 0], row), _joined(number_N * row, row)))
    return parts


def _joined(start_N: torch.Tensor, row: int) -> Placement:
    """Rows that begin at these positions, as runs: those that follow one another are one."""
    first = torch.cat([start_N.new_zeros(1), (start_N.diff() != row).nonzero().flatten() + 1])
    length = torch.cat([first[1:], first.new_tensor([len(start_N)])]).sub(first).mul(row)
    return Placement(tuple(start_N[first].tolist()), tuple(length.tolist()))


def _by_elements(convert: Convert, numel: int) -> list[Part]:
    """Every element carries its number, a digit in each pass."""
    positions = torch.arange(numel)
    slots: Slots = []
    counts, index, number = (torch.zeros(0, dtype=torch.int64) for _ in range(3))
    for i in range(_digits(numel)):
        digit = (positions // DIGIT_BASE**i % DIGIT_BASE + 1).to(torch.bfloat16)
        slots, counts, index, value = convert(positions, digit)
        number = (value - 1) * DIGIT_BASE**i + (number if i else 0)
    if number.unique().numel() != number.numel() or not bool(((number >= 0) & (number < numel)).all()):
        raise ValueError("its values are not handed out as they are stored")
    return [
        Part(slot, tuple(shape), placement_of_positions(at), placement_of_positions(source))
        for (slot, shape), at, source in zip(
            slots, index.split(counts.tolist()), number.split(counts.tolist()), strict=True
        )
        if at.numel()
    ]


def _digits(count: int) -> int:
    """How many digits the numbers below `count` have."""
    digits = 1
    while DIGIT_BASE**digits < count:
        digits += 1
    return digits
