# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""`encodings.sparse`, compiled: one look at each weight, and at the entries of the rows before while its block is near.

Threads take some blocks each, and a block's part of the row of H is a sum of its own: they do not show.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch

from relex_verl.trajectory.encodings.packed import Row
from relex_verl.trajectory.encodings.sparse import BLOCK, SparseIncrement
from relex_verl.trajectory.kernels.arrays import Array, addresses, readable, rows_before, words
from relex_verl.trajectory.kernels.compile import at, float_of, kernel, word_of
from relex_verl.trajectory.parallel import share

__all__ = ["accumulate", "advance", "take"]

BLOCKS = 8  # that a thread takes at a time
WORD = 4096  # weights that are compared in one go; where they differ is then looked at by sixteens
COUNT, INDEX, VALUE, ODD_INDEX, ODD_OLD, ODD_NEW = range(6)  # columns of a table: the fields of an increment
INFINITE = np.uint16(0x7F80)
_LOCAL = threading.local()


def take(state: torch.Tensor, new: torch.Tensor, before: Sequence[Row[SparseIncrement]], room: None = None) -> Any:
    """See `encodings.sparse.take`; NotImplemented where its arguments are not for a kernel."""
    if not readable(state, new) or state.dtype != torch.bfloat16 or state.shape != new.shape or not len(state):
        return NotImplemented
    table, (now, shift), (old, _) = rows_before(before, 6), words(new), words(state)
    blocks = -(-len(old) // BLOCK)
    starts = _starts(table, blocks)
    counts, sums = np.zeros(blocks, np.int32), np.zeros((blocks, len(before) + 1))

    def look(part: int) -> tuple[Array, ...] | None:
        bits, dense, *entries = _scratch()
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
    starts = _starts(table, blocks)
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
    starts, predicted = _starts(table, blocks), torch.empty(last.shape, dtype=dtype)

    def fill(block: int) -> None:
        _, total, *_ = _scratch()
        part = predicted[block * BLOCK : (block + 1) * BLOCK]
        _accumulate(begin, table, starts, factors, block, total)
        part.copy_(torch.from_numpy(total)[: len(part)])

    share(fill, blocks)
    return predicted


def _scratch() -> tuple[Array, ...]:
    """This thread's: a bit and a change for each element of a block; entries, as many as `BLOCKS` can have, not in memory
    before they are written."""
    if not hasattr(_LOCAL, "arrays"):
        most = BLOCKS * BLOCK
        types = np.int16, np.int16, np.int64, np.int16, np.int16
        _LOCAL.arrays = np.zeros(BLOCK // 64, np.uint64), np.empty(BLOCK), *(np.empty(most, one) for one in types)
    return _LOCAL.arrays


@kernel
def _starts(table, blocks):
    """(t, blocks + 1): how many regular entries come before each block."""
    starts = np.zeros((len(table), blocks + 1), np.int64)
    for row in range(len(table)):
        counts = numba.carray(at(table[row, 0, COUNT]), (blocks,), np.int32)
        for block in range(blocks):
            starts[row, block + 1] = starts[row, block] + counts[block]
    return starts


@kernel
def _entries(table, starts, row, block):
    """A row's regular entries of a block: index and value."""
    first, count = starts[row, block], starts[row, block + 1] - starts[row, block]
    index = numba.carray(at(table[row, 0, INDEX] + 2 * first), (count,), np.uint16)
    return index, numba.carray(at(table[row, 0, VALUE] + 2 * first), (count,), np.uint16)


@kernel
def _exceptions(table, row, block):
    """A row's exceptions of a block: position in the shard, old and new."""
    count = (table[row, 1, ODD_INDEX] - table[row, 0, ODD_INDEX]) // 8
    position = numba.carray(at(table[row, 0, ODD_INDEX]), (count,), np.int64)
    old = numba.carray(at(table[row, 0, ODD_OLD]), (count,), np.uint16)
    new = numba.carray(at(table[row, 0, ODD_NEW]), (count,), np.uint16)
    if not count:
        return position, old, new
    first, last = _first(position, block * BLOCK), _first(position, (block + 1) * BLOCK)
    return position[first:last], old[first:last], new[first:last]


@kernel
def _first(ascending, value):
    """How many are below a value."""
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) // 2
        if ascending[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _exact(bits):
    """float64 of a bfloat16."""
    return np.float64(float_of(np.uint32(np.uint32(bits) << np.uint32(16))))


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
                    change = _exact(after) - _exact(old[i])
                    rounded = _rounded(word_of(np.float32(change)))
                    exact = _exact(rounded)
                    # See `encodings.sparse._encode_chunk`.
                    replays = np.float32(np.float32(_exact(old[i])) + np.float32(exact)) == np.float32(_exact(after))
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
            total = 0.0
            entries, changes = _entries(table, starts, row, block)
            for k in range(len(entries)):
                i = entries[k]
                if (bits[i >> 6] >> np.uint64(i & 63)) & np.uint64(1):
                    total += dense[i] * _exact(changes[k])
            positions, olds, news = _exceptions(table, row, block)
            for k in range(len(positions)):
                i = positions[k] - begin
                if (bits[i >> 6] >> np.uint64(i & 63)) & np.uint64(1):
                    total += dense[i] * (_exact(news[k]) - _exact(olds[k]))
            sums[block, row] = total
        bits[:] = 0
    return kept, odd


@kernel
def _advance(old, table, starts, first, last):
    for block in range(first, last):
        entries, changes = _entries(table, starts, 0, block)
        for k in range(len(entries)):
            i = block * BLOCK + entries[k]
            after = np.float32(np.float32(_exact(old[i])) + np.float32(_exact(changes[k])))
            old[i] = _rounded(word_of(after))
        positions, _, news = _exceptions(table, 0, block)
        for k in range(len(positions)):
            old[positions[k]] = news[k]


@kernel
def _accumulate(last, table, starts, coefficients, block, total):
    """A block's theta_last + sum_t (w_t - 1) e_t."""
    begin, end = block * BLOCK, min((block + 1) * BLOCK, len(last))
    for i in range(begin, end):
        total[i - begin] = _exact(last[i])
    for row in range(len(table)):
        coefficient = coefficients[row]
        entries, changes = _entries(table, starts, row, block)
        for k in range(len(entries)):
            total[entries[k]] += coefficient * _exact(changes[k])
        positions, olds, news = _exceptions(table, row, block)
        for k in range(len(positions)):
            total[positions[k] - begin] += coefficient * (_exact(news[k]) - _exact(olds[k]))
