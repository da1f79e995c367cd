# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The loops of `kernels.quantized`: pieces of 4096 elements, while the processor fetches the next one."""

import numba
import numpy as np

from relex_verl.trajectory.encodings.quantized import GROUP
from relex_verl.trajectory.kernels.compile import address, at, float_of, kernel, prefetch, tree

__all__ = ["CHUNK", "accumulate", "advance_changes", "advance_codes", "take_changes", "take_codes"]

LANES = 64
HALF = GROUP // 2  # bytes of a group of codes of 4 bits
LINE = 16  # float32 of a cache line
PIECE = GROUP * LANES  # elements whose codes stay in the first cache while those of the rows before pass by
CHUNK = 64 * PIECE  # as `encodings.quantized`
INFINITE = np.uint32(0x7F800000)
ROUND = np.float32(1.5 * 2**23)  # added and taken off again it rounds to the nearest integer, half to even


@kernel
def _load(old, new, shift, start, stop, bits):
    """float32 changes of [start, stop), as words; 0 up to the end of their last group. What comes next is fetched."""
    change, count = bits.view(np.float32), stop - start
    lines = count // LINE
    for line in range(lines):
        begin = line * LINE
        prefetch(address(old, start + begin + PIECE))
        prefetch(address(new, start + begin + PIECE))
        for i in range(LINE):
            bits[begin + i] = np.uint32(new[start + begin + i]) << shift
        for i in range(LINE):
            change[begin + i] -= old[start + begin + i]
    for i in range(lines * LINE, count):
        bits[i] = np.uint32(new[start + i]) << shift
        change[i] -= old[start + i]
    for i in range(count, -(-count // GROUP) * GROUP):
        change[i] = np.float32(0)


@kernel
def _largest(bits, begin, end):
    """Bits of the largest magnitude within [begin, end): more than those of infinity where one is not a number."""
    largest = np.uint32(0)
    for i in range(begin, end):
        largest = max(largest, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return largest


@kernel
def take_codes(old, new, shift, code, scale, bits, top, table, chunk, sums):
    """A chunk's codes and scales, and its part of the row of H into `sums`. How many codes are not 0; -1: not finite."""
    rows, changed = len(table), 0
    words = np.empty(PIECE, np.uint32)
    change, codes = words.view(np.float32), np.empty(PIECE, np.int8)
    low, high = np.empty(PIECE // 2, np.int16), np.empty(PIECE // 2, np.int16)
    lanes, products = np.zeros((rows + 1, LANES)), np.empty(LANES, np.int32)
    least, most = np.float32(-top), np.float32(top)
    end = min((chunk + 1) * CHUNK, len(old))
    for start in range(chunk * CHUNK, end, PIECE):
        stop = min(start + PIECE, end)
        groups, first = -(-(stop - start) // GROUP), start // GROUP
        _load(old, new, shift, start, stop, words)
        for group in range(groups):
            largest = _largest(words, group * GROUP, (group + 1) * GROUP)
            if largest >= INFINITE:
                return -1
            scale[first + group] = float_of(largest) / most
        for group in range(groups):
            one = scale[first + group]
            divisor = one if one > 0 else np.float32(1)
            for i in range(group * GROUP, (group + 1) * GROUP):
                rounded = (change[i] / divisor + ROUND) - ROUND
                codes[i] = np.int8(np.int32(min(max(rounded, least), most)))  # a subnormal scale has few digits
        for i in range(groups * GROUP):
            changed += codes[i] != 0
        here = code[start * bits // 8 : (start + groups * GROUP) * bits // 8]
        if bits == 8:
            here[:] = codes[: groups * GROUP]
        else:
            for i in range(len(here)):
                here[i] = np.int8((np.int32(codes[2 * i]) & 15) | (np.int32(codes[2 * i + 1]) << 4))
        if bits != 8:
            for i in range(len(here)):
                low[i], high[i] = np.int16(codes[2 * i]), np.int16(codes[2 * i + 1])
        for row in range(rows + 1):
            if row < rows:
                other = numba.carray(at(table[row, 0, 0] + start * bits // 8), here.shape, np.int8)
                others = numba.carray(at(table[row, 0, 1] + 4 * first), (groups,), np.float32)
            else:
                other, others = here, scale[first : first + groups]
            if row + 1 < rows:  # what comes next is far away, and begins a page of its own
                ahead = np.uint64(table[row + 1, 0, 0] + start * bits // 8)
            else:
                ahead = np.uint64(table[0, 0, 0] + (start + PIECE) * bits // 8) if rows else np.uint64(0)
            if bits == 8:
                _multiply(here, other, ahead, products)
            else:
                _multiply_halves(low, high, other, ahead, products)
            for group in range(groups):
                both_scales = np.float64(others[group]) * np.float64(scale[first + group])
                lanes[row, group] += np.float64(products[group]) * both_scales
    for row in range(rows + 1):
        sums[chunk, row] = tree(lanes[row])
    return changed


@kernel
def _multiply(here, other, ahead, products):
    """Of each group of codes the inner product with another row's; `ahead` is the address of what comes next."""
    for group in range(len(here) // GROUP):
        prefetch(ahead + np.uint64(group * GROUP))
        begin, product = group * GROUP, np.int32(0)
        for i in range(GROUP):
            product = np.int32(product + np.int32(np.int32(here[begin + i]) * np.int32(other[begin + i])))
        products[group] = product


@kernel
def _multiply_halves(low, high, other, ahead, products):
    """The same of codes of 4 bits, two a byte: one row's by themselves, the other's as they are stored."""
    for group in range(len(other) // HALF):
        prefetch(ahead + np.uint64(group * HALF))
        begin, product = group * HALF, np.int32(0)
        for i in range(HALF):
            both = np.int16(other[begin + i])
            lower = np.int16(low[begin + i] * np.int16(np.int16(both << 12) >> 12))
            product = np.int32(product + np.int32(np.int16(lower + np.int16(high[begin + i] * np.int16(both >> 4)))))
        products[group] = product


@kernel
def _low(byte):
    """The low nibble, with its sign."""
    return np.int32(np.int32(np.int32(byte) << 28) >> 28)


@kernel
def take_changes(old, new, shift, code, table, chunk, sums):
    """`_take_codes` without any: float32 changes."""
    rows, changed = len(table), 0
    words = np.empty(PIECE, np.uint32)
    change, products = words.view(np.float32), np.empty(GROUP)
    lanes = np.zeros((rows + 1, LANES))
    end = min((chunk + 1) * CHUNK, len(old))
    for start in range(chunk * CHUNK, end, PIECE):
        stop = min(start + PIECE, end)
        groups = -(-(stop - start) // GROUP)
        _load(old, new, shift, start, stop, words)
        if _largest(words, 0, stop - start) >= INFINITE:
            return -1
        code[start:stop] = change[: stop - start]
        for i in range(stop - start):
            changed += change[i] != 0
        for row in range(rows + 1):
            if row < rows:
                other = numba.carray(at(table[row, 0, 0] + 4 * start), (stop - start,), np.float32)
            else:
                other = code[start:stop]
            for group in range(groups):
                begin = group * GROUP
                if begin + GROUP <= stop - start:
                    for i in range(GROUP):
                        products[i] = np.float64(other[begin + i]) * np.float64(change[begin + i])
                else:
                    products[:] = 0.0
                    for i in range(stop - start - begin):
                        products[i] = np.float64(other[begin + i]) * np.float64(change[begin + i])
                lanes[row, group] += tree(products)
    for row in range(rows + 1):
        sums[chunk, row] = tree(lanes[row])
    return changed


@kernel
def advance_codes(old, code, scale, bits, chunk):
    end = min((chunk + 1) * CHUNK, len(old))
    change = np.empty(PIECE)
    for start in range(chunk * CHUNK, end, PIECE):
        stop = min(start + PIECE, end)
        _changes(code, scale, bits, start, stop, change)
        lines = (stop - start) // LINE
        for line in range(lines):
            begin = line * LINE
            prefetch(address(old, start + begin + PIECE))
            for i in range(LINE):
                old[start + begin + i] = np.float32(change[begin + i] + np.float64(old[start + begin + i]))
        for i in range(lines * LINE, stop - start):
            old[start + i] = np.float32(change[i] + np.float64(old[start + i]))


@kernel
def _changes(code, scale, bits, start, stop, change):
    """Change of the elements [start, stop), exact."""
    groups = -(-(stop - start) // GROUP)
    if bits == 8:
        for group in range(groups):
            one, begin = np.float64(scale[start // GROUP + group]), group * GROUP
            prefetch(address(code, start + begin + PIECE))
            for i in range(GROUP):
                change[begin + i] = np.float64(code[start + begin + i]) * one
    else:
        for group in range(groups):
            one = np.float64(scale[start // GROUP + group])
            begin = group * HALF
            prefetch(address(code, (start + PIECE) // 2 + begin))
            for i in range(HALF):
                byte = code[start // 2 + begin + i]
                change[2 * (begin + i)] = np.float64(_low(byte)) * one
                change[2 * (begin + i) + 1] = np.float64(np.int32(byte >> 4)) * one


@kernel
def advance_changes(old, code, chunk):
    for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(old))):
        old[i] = np.float32(np.float64(code[i]) + np.float64(old[i]))


@kernel
def accumulate(origin, table, bits, weights, chunk, predicted):
    """A chunk's theta_0 + sum_t a_t (state_t - theta_0), the states replayed."""
    first, end = chunk * CHUNK, min((chunk + 1) * CHUNK, len(origin))
    change, state, total = np.empty(PIECE), np.empty(PIECE, np.float32), np.empty(PIECE)
    for start in range(first, end, PIECE):
        count = min(PIECE, end - start)
        groups = -(-count // GROUP)
        state[:count] = origin[start : start + count]
        for i in range(count):
            total[i] = np.float64(state[i])
        for row in range(len(table)):
            if bits:
                held = groups * GROUP * bits // 8
                code = numba.carray(at(table[row, 0, 0] + start * bits // 8), (held,), np.int8)
                scale = numba.carray(at(table[row, 0, 1] + start // GROUP * 4), (groups,), np.float32)
                _changes(code, scale, bits, 0, count, change)
            else:
                changes = numba.carray(at(table[row, 0, 0] + 4 * start), (count,), np.float32)
                for i in range(count):
                    change[i] = np.float64(changes[i])
            weight = weights[row]
            for i in range(count):
                state[i] = np.float32(change[i] + np.float64(state[i]))
                total[i] += weight * (np.float64(state[i]) - np.float64(origin[start + i]))
        for i in range(count):
            predicted[start - first + i] = total[i]
