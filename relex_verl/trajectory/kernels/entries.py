# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""What lies in a table of sparse increments (`arrays.addresses`), block by block, and the products of its rows.

Where the rows are all there, H is formed block by block, of every pair while the block's entries are near.
"""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numba
import numpy as np
import torch

from relex_verl.trajectory.encodings.sparse import BLOCK, SparseIncrement
from relex_verl.trajectory.kernels.arrays import Array, addresses
from relex_verl.trajectory.kernels.compile import at, float_of, kernel
from relex_verl.trajectory.parallel import share

__all__ = [
    "BLOCKS",
    "LOW",
    "ONE",
    "SIX",
    "entries_of",
    "exact_of",
    "exceptions_of",
    "product",
    "products",
    "scratch",
    "starts_of",
]

BLOCKS = 8  # that a thread takes at a time
ONE, SIX, EIGHT, LOW = (np.uint64(number) for number in (1, 6, 8, 63))
COUNT, INDEX, VALUE, ODD_INDEX, ODD_OLD, ODD_NEW = range(6)  # columns of a table: the fields of an increment
_LOCAL = threading.local()


def products(increments: Sequence[SparseIncrement], numel: int, wanted: Sequence[int]) -> Any:
    """See `encodings.sparse.products`."""
    table, blocks, rows = addresses(increments), -(-numel // BLOCK), np.array(wanted, np.int64)
    starts, total = starts_of(table, blocks), np.zeros((len(wanted), len(increments)))

    def look(block: int) -> Array:
        bits, dense, hits, *_ = scratch()
        sums = np.zeros_like(total)
        _pairs(table, starts, rows, block, bits, dense, hits, sums)
        return sums

    for first in range(0, blocks, BLOCKS):  # not all at once: their sums would take more memory than the rows
        for sums in share(partial(lambda first, i: look(first + i), first), min(BLOCKS, blocks - first)):
            total += sums
    return [torch.from_numpy(row[: t + 1].copy()) for t, row in zip(wanted, total, strict=True)]


def scratch() -> tuple[Array, ...]:
    """This thread's: a bit and a change for each element of `BLOCKS`; positions of a block's entries; and an entry for each
    element. Not in memory before they are written."""
    if not hasattr(_LOCAL, "arrays"):
        most = BLOCKS * BLOCK
        types = np.int16, np.int16, np.int64, np.int16, np.int16
        entries = (np.empty(most, one) for one in types)
        _LOCAL.arrays = np.zeros(most // 64, np.uint64), np.empty(most), np.empty(BLOCK, np.uint64), *entries
    return _LOCAL.arrays


@kernel
def exact_of(bits):
    """float64 of a bfloat16."""
    return np.float64(float_of(np.uint32(np.uint32(bits) << np.uint32(16))))


@kernel
def starts_of(table, blocks):
    """(t, blocks + 1): how many regular entries come before each block."""
    starts = np.zeros((len(table), blocks + 1), np.int64)
    for row in range(len(table)):
        counts = numba.carray(at(table[row, 0, COUNT]), (blocks,), np.int32)
        for block in range(blocks):
            starts[row, block + 1] = starts[row, block] + counts[block]
    return starts


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
def entries_of(table, starts, row, block):
    """A row's regular entries of a block: index and value."""
    first, count = starts[row, block], starts[row, block + 1] - starts[row, block]
    index = numba.carray(at(table[row, 0, INDEX] + 2 * first), (count,), np.uint16)
    return index, numba.carray(at(table[row, 0, VALUE] + 2 * first), (count,), np.uint16)


@kernel
def exceptions_of(table, row, block):
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
def product(table, starts, row, block, base, bits, dense, hits):
    """Inner product of a row's changes of a block with those that `bits` marks, which stand in `dense` from `base` on.

    Entries whose weights have changed again are found first, hardly one of a hundred: what the second loop reads for them
    comes from far away, and does not have to wait for one another.
    """
    entries, changes = entries_of(table, starts, row, block)
    count, found, base = np.uint64(len(entries)), np.uint64(0), np.uint64(base)
    k = np.uint64(0)
    while k < count:
        if k + EIGHT <= count:
            common = np.uint64(0)
            for j in range(8):
                i = base + np.uint64(entries[k + np.uint64(j)])
                common |= bits[i >> SIX] >> (i & LOW)
            if not common & ONE:
                k += EIGHT
                continue
        until = min(k + EIGHT, count)
        while k < until:
            i = base + np.uint64(entries[k])
            hits[found] = k
            found += (bits[i >> SIX] >> (i & LOW)) & ONE
            k += ONE
    total = 0.0
    for hit in range(found):
        k = hits[hit]
        total += dense[base + np.uint64(entries[k])] * exact_of(changes[k])
    positions, olds, news = exceptions_of(table, row, block)
    for odd in range(len(positions)):
        i = base + np.uint64(positions[odd] - block * BLOCK)
        if (bits[i >> SIX] >> (i & LOW)) & ONE:
            total += dense[i] * (exact_of(news[odd]) - exact_of(olds[odd]))
    return total


@kernel
def _pairs(table, starts, wanted, block, bits, dense, hits, sums):
    """A block's products of each row that is wanted with itself and with those before, into `sums`."""
    for w in range(len(wanted)):
        entries, changes = entries_of(table, starts, wanted[w], block)
        positions, olds, news = exceptions_of(table, wanted[w], block)
        for k in range(len(entries)):
            i = entries[k]
            dense[i] = exact_of(changes[k])
            bits[i >> 6] |= np.uint64(1) << np.uint64(i & 63)
        for k in range(len(positions)):
            i = positions[k] - block * BLOCK
            dense[i] = exact_of(news[k]) - exact_of(olds[k])
            bits[i >> 6] |= np.uint64(1) << np.uint64(i & 63)
        if len(entries) or len(positions):
            for row in range(wanted[w] + 1):
                sums[w, row] = product(table, starts, row, block, 0, bits, dense, hits)
            bits[: BLOCK // 64] = 0
