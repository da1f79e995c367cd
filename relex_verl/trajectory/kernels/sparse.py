"""`encodings.sparse`, compiled: one look at each weight, and at the entries of the rows before while its block is near.

Threads take some blocks each, and a block's part of the row of H is a sum of its own: they do not show.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from relex_verl.trajectory.encodings.packed import Row
from relex_verl.trajectory.encodings.sparse import BLOCK, SparseIncrement
from relex_verl.trajectory.kernels import sparse_loops as loops
from relex_verl.trajectory.kernels.arrays import Array, addresses, readable, rows_before, words
from relex_verl.trajectory.kernels.entries import BLOCKS, scratch, starts_of
from relex_verl.trajectory.parallel import share

__all__ = ["accumulate", "advance", "take"]


def take(state: torch.Tensor, new: torch.Tensor, before: Sequence[Row[SparseIncrement]], room: None = None) -> Any:
    """See `encodings.sparse.take`; NotImplemented where its arguments are not for a kernel."""
    if not readable(state, new) or state.dtype != torch.bfloat16 or state.shape != new.shape or not len(state):
        return NotImplemented
    table, (now, shift), (old, _) = rows_before(before, 6), words(new), words(state)
    blocks = -(-len(old) // BLOCK)
    starts = starts_of(table, blocks)
    counts, sums = np.zeros(blocks, np.int32), np.zeros((blocks, len(before) + 1))

    def look(part: int) -> tuple[Array, ...] | None:
        bits, dense, hits, *entries = scratch()
        last = min((part + 1) * BLOCKS, blocks)
        kept, odd = loops.take(
            old, now, shift, table, starts, part * BLOCKS, last, counts, sums, bits, dense, hits, *entries
        )
        if kept < 0:
            return None
        index, value, *odds = entries
        return index[:kept].copy(), value[:kept].copy(), *(one[:odd].copy() for one in odds)

    parts = share(look, -(-blocks // BLOCKS))
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        raise ValueError("weights are not finite (NaN or infinity): the training run itself has diverged")
    index, value, odd_index, odd_old, odd_new = (
        torch.from_numpy(np.concatenate(one)) for one in zip(*found, strict=True)
    )
    odds = (odd_index, odd_old.view(torch.bfloat16), odd_new.view(torch.bfloat16))
    increment = SparseIncrement(torch.from_numpy(counts), index, value.view(torch.bfloat16), *odds)
    row_T = np.zeros(len(before) + 1)
    for one in sums:
        row_T += one
    return increment, torch.from_numpy(row_T), increment.changed


def advance(state: torch.Tensor, increment: SparseIncrement) -> Any:
    """See `encodings.sparse.advance`; NotImplemented where its arguments are not for a kernel."""
    if not readable(state) or state.dtype != torch.bfloat16 or not len(state):
        return NotImplemented
    table, (old, _) = addresses([increment]), words(state)
    blocks = -(-len(old) // BLOCK)
    starts = starts_of(table, blocks)
    share(
        lambda part: loops.advance(old, table, starts, part * BLOCKS, min((part + 1) * BLOCKS, blocks)),
        -(-blocks // BLOCKS),
    )
    return None


def accumulate(
    last: torch.Tensor,
    increments: Sequence[SparseIncrement],
    coefficients: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """See `encodings.sparse.accumulate`; NotImplemented where its arguments are not for a kernel."""
    if not readable(last) or last.dtype != torch.bfloat16 or len(increments) != len(coefficients) or not increments:
        return NotImplemented
    table, (begin, _), factors = addresses(increments), words(last), np.array(coefficients, np.float64)
    blocks = -(-len(begin) // BLOCK)
    starts, predicted = starts_of(table, blocks), torch.empty(last.shape, dtype=dtype)

    def fill(block: int) -> None:
        _, total, *_ = scratch()
        part = predicted[block * BLOCK : (block + 1) * BLOCK]
        loops.accumulate(begin, table, starts, factors, block, total)
        part.copy_(torch.from_numpy(total)[: len(part)])

    share(fill, blocks)
    return predicted
