# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""`encodings.quantized`, compiled: for a row, each weight, state and stored code is read once.

Threads take chunks, and a chunk's part of the row of H is summed in an order of its own (`maths.sums`): they do not show.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch

from relex_verl.trajectory.encodings.packed import Row
from relex_verl.trajectory.encodings.quantized import GROUP, LEVELS, QuantizedIncrement
from relex_verl.trajectory.kernels.arrays import addresses, readable, rows_before, words
from relex_verl.trajectory.kernels.compile import at, float_of, kernel, tree
from relex_verl.trajectory.parallel import share

__all__ = ["accumulate", "advance", "take"]

LANES = 64
PIECE = GROUP * LANES  # elements whose codes stay in the first cache while those of the rows before pass by
CHUNK = 64 * PIECE  # as `encodings.quantized`
INFINITE = np.uint32(0x7F800000)
ROUND = np.float32(1.5 * 2**23)  # added and taken off again it rounds to the nearest integer, half to even


def take(
    state: torch.Tensor,
    new: torch.Tensor,
    before: Sequence[Row[QuantizedIncrement]],
    room: QuantizedIncrement,
    bits: int,
) -> Any:
    """See `encodings.quantized.take`; NotImplemented where its arguments are not for a kernel."""
    if not readable(state, new) or state.dtype != torch.float32 or state.shape != new.shape:
        return NotImplemented
    table, (now, shift) = rows_before(before, 2), words(new)
    chunks = -(-len(state) // CHUNK)
    sums = np.zeros((chunks, len(before) + 1))
    code, scale, old = room.code.numpy(), room.scale.numpy(), state.numpy()
    if bits:
        signed, top = code.view(np.int8), np.int32(LEVELS[bits])
        changed = share(
            lambda chunk: _take_codes(old, now, shift, signed, scale, bits, top, table, chunk, sums), chunks
        )
    else:
        changed = share(lambda chunk: _take_changes(old, now, shift, code, table, chunk, sums), chunks)
    if min(changed, default=0) < 0:
        raise ValueError("weights are not finite (NaN or infinity): the training run itself has diverged")
    row_T = np.zeros(len(before) + 1)
    for one in sums:
        row_T += one
    return room, torch.from_numpy(row_T), sum(changed)


def advance(state: torch.Tensor, increment: QuantizedIncrement) -> Any:
    """See `encodings.quantized.advance`; NotImplemented where its arguments are not for a kernel."""
    if not readable(state):
        return NotImplemented
    old, code, scale = state.numpy(), increment.code.numpy(), increment.scale.numpy()
    if increment.bits:
        signed, bits = code.view(np.int8), increment.bits
        share(lambda chunk: _advance_codes(old, signed, scale, bits, chunk), -(-len(old) // CHUNK))
    else:
        share(lambda chunk: _advance_changes(old, code, chunk), -(-len(old) // CHUNK))
    return None


def accumulate(
    origin: torch.Tensor,
    increments: Sequence[QuantizedIncrement],
    weights: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """See `encodings.quantized.accumulate`; NotImplemented where its arguments are not for a kernel."""
    if not readable(origin) or origin.dtype != torch.float32 or len(increments) != len(weights) or not increments:
        return NotImplemented
    table, begin, factors = addresses(increments), origin.numpy(), np.array(weights, np.float64)
    predicted, bits = torch.empty(origin.shape, dtype=dtype), increments[0].bits

    def fill(chunk: int) -> None:
        part = predicted[chunk * CHUNK : (chunk + 1) * CHUNK]
        # Every type but float64 is rounded from float32, here and by torch.
        total = np.empty(len(part), np.float64 if dtype == torch.float64 else np.float32)
        _accumulate(begin, table, bits, factors, chunk, total)
        part.copy_(torch.from_numpy(total))

    share(fill, -(-len(begin) // CHUNK))
    return predicted


@kernel
def _load(old, new, shift, start, stop, bits):
    """float32 changes of [start, stop), as words; 0 up to the end of their last group."""
    change, count = bits.view(np.float32), stop - start
    for i in range(count):
        bits[i] = np.uint32(new[start + i]) << shift
    for i in range(count):
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
def _take_codes(old, new, shift, code, scale, bits, top, table, chunk, sums):
    """A chunk's codes and scales, and its part of the row of H into `sums`. How many codes are not 0; -1: not finite."""
    rows, changed = len(table), 0
    words = np.empty(PIECE, np.uint32)
    change, codes = words.view(np.float32), np.empty(PIECE, np.int8)
    lanes = np.zeros((rows + 1, LANES))
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
        for row in range(rows + 1):
            if row < rows:
                other = numba.carray(at(table[row, 0, 0] + start * bits // 8), here.shape, np.int8)
                others = numba.carray(at(table[row, 0, 1] + 4 * first), (groups,), np.float32)
            else:
                other, others = here, scale[first : first + groups]
            for group in range(groups):
                product = np.int32(0)
                if bits == 8:
                    for i in range(group * GROUP, (group + 1) * GROUP):
                        product = np.int32(product + np.int32(np.int32(here[i]) * np.int32(other[i])))
                else:
                    for i in range(group * GROUP // 2, (group + 1) * GROUP // 2):
                        low = np.int32(_low(here[i]) * _low(other[i]))
                        high = np.int32(np.int32(here[i] >> 4) * np.int32(other[i] >> 4))
                        product = np.int32(product + np.int32(low + high))
                both = np.float64(others[group]) * np.float64(scale[first + group])
                lanes[row, group] += np.float64(product) * both
    for row in range(rows + 1):
        sums[chunk, row] = tree(lanes[row])
    return changed


@kernel
def _low(byte):
    """The low nibble, with its sign."""
    return np.int32(np.int32(np.int32(byte) << 28) >> 28)


@kernel
def _take_changes(old, new, shift, code, table, chunk, sums):
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
def _advance_codes(old, code, scale, bits, chunk):
    end = min((chunk + 1) * CHUNK, len(old))
    change = np.empty(PIECE)
    for start in range(chunk * CHUNK, end, PIECE):
        stop = min(start + PIECE, end)
        _changes(code, scale, bits, start, stop, change)
        for i in range(stop - start):
            old[start + i] = np.float32(change[i] + np.float64(old[start + i]))


@kernel
def _changes(code, scale, bits, start, stop, change):
    """Change of the elements [start, stop), exact."""
    groups = -(-(stop - start) // GROUP)
    if bits == 8:
        for group in range(groups):
            one = np.float64(scale[start // GROUP + group])
            for i in range(group * GROUP, (group + 1) * GROUP):
                change[i] = np.float64(code[start + i]) * one
    else:
        for group in range(groups):
            one = np.float64(scale[start // GROUP + group])
            for i in range(group * GROUP // 2, (group + 1) * GROUP // 2):
                byte = code[start // 2 + i]
                change[2 * i] = np.float64(_low(byte)) * one
                change[2 * i + 1] = np.float64(np.int32(byte >> 4)) * one


@kernel
def _advance_changes(old, code, chunk):
    for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(old))):
        old[i] = np.float32(np.float64(code[i]) + np.float64(old[i]))


@kernel
def _accumulate(origin, table, bits, weights, chunk, predicted):
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
