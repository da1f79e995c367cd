# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The loops of `kernels.sparse`."""

import numpy as np

from relex_verl.trajectory.encodings.sparse import BLOCK
from relex_verl.trajectory.kernels.compile import address, kernel, lowest, prefetch, word_of
from relex_verl.trajectory.kernels.entries import LOW, ONE, SIX, entries_of, exact_of, exceptions_of, product

__all__ = ["accumulate", "advance", "take"]

AHEAD = 16  # entries between the one whose weight is fetched and the one that is applied
WORD = 4096  # weights that are compared in one go; where they differ is then looked at by fours
INFINITE = np.uint16(0x7F80)


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
                sums[block, row] = product(table, starts, row, block, (block - first) * BLOCK, bits, dense, hits)
        bits[:] = 0
    return kept, odd


@kernel
def advance(old, table, starts, first, last):
    for block in range(first, last):
        entries, changes = entries_of(table, starts, 0, block)
        for k in range(len(entries)):
            prefetch(address(old, block * BLOCK + entries[min(k + AHEAD, len(entries) - 1)]))
            i = block * BLOCK + entries[k]
            after = np.float32(np.float32(exact_of(old[i])) + np.float32(exact_of(changes[k])))
            old[i] = _rounded(word_of(after))
        positions, _, news = exceptions_of(table, 0, block)
        for k in range(len(positions)):
            old[positions[k]] = news[k]


@kernel
def accumulate(last, table, starts, coefficients, block, total):
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
