# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""`encodings.sparse`, compiled: one look at each weight, and at the entries of the rows before while its block is near.

Threads take some blocks each, and a block's part of the row of H is a sum of its own: they do not show.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from relex_verl.trajectory.encodings.packed import Row
from relex_verl.trajectory.encodings.sparse import BLOCK, SparseIncrement
from relex_verl.trajectory.kernels.arrays import Array, addresses, readable, rows_before, words
from relex_verl.trajectory.kernels.compile import kernel, word_of
from relex_verl.trajectory.kernels.entries import (
    BLOCKS,
    entries_of,
    exact_of,
    exceptions_of,
    product,
    scratch,
    starts_of,
)
from relex_verl.trajectory.parallel import share

__all__ = ["accumulate", "advance", "take"]

WORD = 4096  # weights that are compared in one go; where they differ is then looked at by sixteens
INFINITE = np.uint16(0x7F80)


def take(state: torch.Tensor, new: torch.Tensor, before: Sequence[Row[SparseIncrement]], room: None = None) -> Any:
    """See `encodings.sparse.take`; NotImplemented where its arguments are not for a kernel."""
    if not readable(state, new) or state.dtype != torch.bfloat16 or state.shape != new.shape or not len(state):
        return NotImplemented
    table, (now, shift), (old, _) = rows_before(before, 6), words(new), words(state)
    blocks = -(-len(old) // BLOCK)
    starts = starts_of(table, blocks)
    counts, sums = np.zeros(blocks, np.int32), np.zeros((blocks, len(before) + 1))

    def look(part: int) -> tuple[Array, ...] | None:
        bits, dense, *entries = scratch()
        last = min((part + 1) * BLOCKS, blocks)
        kept, odd = _take(old, now, shift, table, starts, part * BLOCKS, last, counts, sums, bits, dense, *entries)
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
        lambda part: _advance(old, table, starts, part * BLOCKS, min((part + 1) * BLOCKS, blocks)), -(-blocks // BLOCKS)
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
        _accumulate(begin, table, starts, factors, block, total)
        part.copy_(torch.from_numpy(total)[: len(part)])

    share(fill, blocks)
    return predicted


@kernel
def _rounded(word):
    """bfloat16 nearest to a float32, half to even; both as words."""
    odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
    nearest = np.uint32(np.uint32(word + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    isnan = np.uint32(word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(0x7FC0) if isnan else np.uint16(nearest)


@kernel
def _compare(old, now, shift, differing):
    for i in range(len(old)):
        differing[i] = np.uint16(_rounded(np.uint32(np.uint32(now[i]) << shift)) ^ old[i])


@kernel
def _take(
    old, now, shift, table, starts, first, last, counts, sums, bits, dense, index, value, odd_index, odd_old, odd_new
):
    """Some blocks' entries, and their parts of the row of H into `sums`. How many are regular, and exceptions; -1: not
    finite."""
    kept = odd = 0
    differing = np.zeros(WORD, np.uint16)
    quarters = differing.view(np.uint64)
    for block in range(first, last):
        begin, end = block * BLOCK, min((block + 1) * BLOCK, len(old))
        kept_before, odd_before = kept, odd
        for start in range(begin, end, WORD):
            stop = min(start + WORD, end)
            _compare(old[start:stop], now[start:stop], shift, differing)
            for sixteen in range(-(-(stop - start) // 16)):
                four = quarters[4 * sixteen : 4 * sixteen + 4]
                if not (four[0] | four[1] | four[2] | four[3]):
                    continue
                for i in range(start + 16 * sixteen, min(start + 16 * sixteen + 16, stop)):
                    if not differing[i - start]:
                        continue
                    after = np.uint16(differing[i - start] ^ old[i])
                    if np.uint16(after & np.uint16(0x7FFF)) >= INFINITE:
                        return -1, 0
                    change = exact_of(after) - exact_of(old[i])
                    rounded = _rounded(word_of(np.float32(change)))
                    exact = exact_of(rounded)
                    # See `encodings.sparse._encode_chunk`.
                    replays = np.float32(np.float32(exact_of(old[i])) + np.float32(exact)) == np.float32(
                        exact_of(after)
                    )
                    if exact == change and replays and exact != 0 and after != np.uint16(0x8000):
                        index[kept], value[kept] = np.int16(i - begin), np.int16(rounded)
                        kept += 1
                    else:
                        odd_index[odd], odd_old[odd], odd_new[odd] = i, np.int16(old[i]), np.int16(after)
                        odd += 1
                    dense[i - begin] = change
                    bits[(i - begin) >> 6] |= np.uint64(1) << np.uint64((i - begin) & 63)
        counts[block] = kept - kept_before
        if kept == kept_before and odd == odd_before:
            continue
        total = 0.0
        for k in range(kept_before, kept):
            change = dense[np.uint16(index[k])]
            total += change * change
        for k in range(odd_before, odd):
            change = dense[odd_index[k] - begin]
            total += change * change
        sums[block, len(table)] = total
        for row in range(len(table)):
            sums[block, row] = product(table, starts, row, block, bits, dense)
        bits[:] = 0
    return kept, odd


@kernel
def _advance(old, table, starts, first, last):
    for block in range(first, last):
        entries, changes = entries_of(table, starts, 0, block)
        for k in range(len(entries)):
            i = block * BLOCK + entries[k]
            after = np.float32(np.float32(exact_of(old[i])) + np.float32(exact_of(changes[k])))
            old[i] = _rounded(word_of(after))
        positions, _, news = exceptions_of(table, 0, block)
        for k in range(len(positions)):
            old[positions[k]] = news[k]


@kernel
def _accumulate(last, table, starts, coefficients, block, total):
    """A block's theta_last + sum_t (w_t - 1) e_t."""
    begin, end = block * BLOCK, min((block + 1) * BLOCK, len(last))
    for i in range(begin, end):
        total[i - begin] = exact_of(last[i])
    for row in range(len(table)):
        coefficient = coefficients[row]
        entries, changes = entries_of(table, starts, row, block)
        for k in range(len(entries)):
            total[entries[k]] += coefficient * exact_of(changes[k])
        positions, olds, news = exceptions_of(table, row, block)
        for k in range(len(positions)):
            total[positions[k] - begin] += coefficient * (exact_of(news[k]) - exact_of(olds[k]))
