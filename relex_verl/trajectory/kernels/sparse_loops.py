# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The loops of `kernels.sparse`."""

import numba
import numpy as np

from relex_verl.trajectory.encodings.sparse import BLOCK
from relex_verl.trajectory.kernels.compile import address, at, float_of, kernel, lowest, prefetch, word_of

__all__ = ["BLOCKS", "accumulate", "advance", "starts", "take"]

BLOCKS = 8  # that a thread takes at a time
WORD = 4096  # weights that are compared in one go; where they differ is then looked at by fours
COUNT, INDEX, VALUE, ODD_INDEX, ODD_OLD, ODD_NEW = range(6)  # columns of a table: the fields of an increment
INFINITE = np.uint16(0x7F80)
ONE, SIX, EIGHT, LOW = (np.uint64(number) for number in (1, 6, 8, 63))


@kernel
def starts(table, blocks):
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
    if shift:  # bfloat16 already
        for i in range(len(old)):
            differing[i] = np.uint16(np.uint16(now[i]) ^ old[i])
    else:
        for i in range(len(old)):
            differing[i] = np.uint16(_rounded(np.uint32(now[i])) ^ old[i])
    differing[len(old) : -(-len(old) // 4) * 4] = np.uint16(0)


@kernel
def take(
    old,
    now,
    shift,
    table,
    starts,
    first,
    last,
    counts,
    sums,
    bits,
    dense,
    hits,
    index,
    value,
    odd_index,
    odd_old,
    odd_new,
):
    """Some blocks' entries, and their parts of the row of H into `sums`. How many are regular, and exceptions; -1: not
    finite. Rows before pass by one after another: their entries of all these blocks lie side by side."""
    kept = odd = 0
    differing = np.zeros(WORD, np.uint16)
    quarters = differing.view(np.uint64)
    for block in range(first, last):
        begin, end, base = block * BLOCK, min((block + 1) * BLOCK, len(old)), (block - first) * BLOCK
        kept_before, odd_before = kept, odd
        for start in range(begin, end, WORD):
            stop = min(start + WORD, end)
            _compare(old[start:stop], now[start:stop], shift, differing)
            for quarter in range(-(-(stop - start) // 4)):
                if not quarter & 7:  # a cache line of each, of what comes next
                    prefetch(address(old, start + WORD + 4 * quarter))
                    prefetch(address(now, start + WORD + 4 * quarter))
                word = quarters[quarter]
                while word:
                    lane = lowest(word) >> 4
                    i = start + 4 * quarter + lane
                    word &= ~(np.uint64(0xFFFF) << np.uint64(16 * lane))
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
                    here = np.uint64(base + i - begin)
                    dense[here] = change
                    bits[here >> SIX] |= ONE << (here & LOW)
        counts[block] = kept - kept_before
        total = 0.0
        for k in range(kept_before, kept):
            change = dense[base + np.uint16(index[k])]
            total += change * change
        for k in range(odd_before, odd):
            change = dense[base + odd_index[k] - begin]
            total += change * change
        sums[block, len(table)] = total
    if kept or odd:
        for row in range(len(table)):
            for block in range(first, last):
                sums[block, row] = _dot(table, starts, row, block, (block - first) * BLOCK, bits, dense, hits)
        bits[:] = 0
    return kept, odd


@kernel
def _dot(table, starts, row, block, base, bits, dense, hits):
    """Inner product of a row's changes of a block with those that `bits` marks, which stand in `dense` from `base` on.

    Entries whose weights have changed again are found first, hardly one of a hundred: what the second loop reads for them
    comes from far away, and does not have to wait for one another.
    """
    entries, changes = _entries(table, starts, row, block)
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
        total += dense[base + np.uint64(entries[k])] * _exact(changes[k])
    positions, olds, news = _exceptions(table, row, block)
    for odd in range(len(positions)):
        i = base + np.uint64(positions[odd] - block * BLOCK)
        if (bits[i >> SIX] >> (i & LOW)) & ONE:
            total += dense[i] * (_exact(news[odd]) - _exact(olds[odd]))
    return total


@kernel
def advance(old, table, starts, first, last):
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
def accumulate(last, table, starts, coefficients, block, total):
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
