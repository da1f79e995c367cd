# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""`encodings.moments`, compiled: each moment is read and written once for a row."""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch

from relex_verl.trajectory.encodings.moments import CHUNK, GROUP, Moment
from relex_verl.trajectory.kernels.arrays import addresses, readable, words
from relex_verl.trajectory.kernels.compile import address, at, float_of, kernel, prefetch, tree, word_of
from relex_verl.trajectory.parallel import share

__all__ = ["accumulate", "add_row"]

LANES = 64
LINE = 16  # float32 of a cache line
PIECE = GROUP * LANES
INFINITE, MAGNITUDE = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)


def add_row(
    origin: torch.Tensor,
    now: torch.Tensor,
    moments: Sequence[Moment],
    weights: Sequence[float],
    change: torch.Tensor | None,
) -> Any:
    """See `encodings.moments.add_row`; NotImplemented where its arguments are not for a kernel."""
    if not readable(origin, now) or origin.dtype != torch.float32 or origin.shape != now.shape:
        return NotImplemented
    size = len(moments)
    table, old, (new, shift) = addresses(moments), origin.numpy(), words(now)
    factors = np.array(weights, np.float32)
    mixed = np.zeros((0, 0), np.float32) if change is None else change.float().numpy()
    chunks = -(-len(old) // CHUNK)
    sums = np.zeros((chunks, size * (size + 1) // 2 + 1))
    if not all(share(lambda chunk: _add_row(old, new, shift, table, factors, mixed, chunk, sums), chunks)):
        raise ValueError("weights are not finite (NaN or infinity): the training run itself has diverged")
    total = np.zeros(sums.shape[1])
    for one in sums:
        total += one
    figures = np.empty(size**2 + 1)
    gram_rr = figures[:-1].reshape(size, size)
    lower = np.tril_indices(size)
    gram_rr[lower] = gram_rr.T[lower] = total[:-1]
    figures[-1] = total[-1]
    return torch.from_numpy(figures)


def accumulate(
    origin: torch.Tensor,
    moments: Sequence[Moment],
    coefficients: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """See `encodings.moments.accumulate`; NotImplemented where its arguments are not for a kernel."""
    if not readable(origin) or origin.dtype != torch.float32 or len(moments) != len(coefficients):
        return NotImplemented
    table, begin, factors = addresses(moments), origin.numpy(), np.array(coefficients, np.float64)
    predicted = torch.empty(origin.shape, dtype=dtype)

    def fill(chunk: int) -> None:
        part = predicted[chunk * CHUNK : (chunk + 1) * CHUNK]
        # Every type but float64 is rounded from float32, here and by torch.
        total = np.empty(len(part), np.float64 if dtype == torch.float64 else np.float32)
        _accumulate(begin, table, factors, chunk, total)
        part.copy_(torch.from_numpy(total))

    share(fill, -(-len(begin) // CHUNK))
    return predicted


@kernel
def _add_row(origin, now, shift, table, weights, mixed, chunk, sums):
    """A chunk's moments, in place, and its part of S S^T and of the row's square into `sums`; whether all is finite."""
    size = len(table)
    delta, rows = np.empty(PIECE, np.float32), np.empty((size + 1, PIECE), np.float32)
    before, wide = np.empty((size, PIECE), np.float32), np.empty((size + 1, GROUP))
    halves = np.empty(GROUP // 4)
    lanes = np.zeros((sums.shape[1], LANES))
    first, end = chunk * CHUNK, min((chunk + 1) * CHUNK, len(origin))
    for start in range(first, end, PIECE):
        count = min(PIECE, end - start)
        groups = -(-count // GROUP)
        if _load(now[start : start + count], shift, origin[start : start + count], delta) >= INFINITE:
            return False
        rows[:, count : groups * GROUP] = np.float32(0)
        for j in range(size):
            moment = numba.carray(at(table[j, 0, 0] + 4 * start), (count,), np.float32)
            if len(mixed):
                _fetch(before[j], moment)
            else:
                _add(rows[j], moment, delta, weights[j])
        if len(mixed):
            for j in range(size):
                row, factor, other = rows[j], mixed[j, 0], before[0]
                for i in range(count):
                    row[i] = other[i] * factor
                for k in range(1, size):
                    factor, other = mixed[j, k], before[k]
                    for i in range(count):
                        row[i] += other[i] * factor
                weight, moment = weights[j], numba.carray(at(table[j, 0, 0] + 4 * start), (count,), np.float32)
                for i in range(count):
                    row[i] += delta[i] * weight
                moment[:] = row[:count]
        rows[size, :count] = delta[:count]
        _products(rows, groups, wide, halves, lanes)
    for pair in range(len(lanes)):
        sums[chunk, pair] = tree(lanes[pair])
    return True


@kernel
def _load(now, shift, origin, delta):
    """Changes since the origin, and the bits of their largest magnitude; what comes next is fetched meanwhile."""
    largest, count, lines = np.uint32(0), len(origin), len(origin) // LINE
    for line in range(lines):
        begin = line * LINE
        prefetch(address(now, begin + PIECE))
        prefetch(address(origin, begin + PIECE))
        for i in range(begin, begin + LINE):
            delta[i] = float_of(np.uint32(now[i]) << shift) - origin[i]
        for i in range(begin, begin + LINE):
            largest = max(largest, np.uint32(word_of(delta[i]) & MAGNITUDE))
    for i in range(lines * LINE, count):
        delta[i] = float_of(np.uint32(now[i]) << shift) - origin[i]
        largest = max(largest, np.uint32(word_of(delta[i]) & MAGNITUDE))
    return largest


@kernel
def _fetch(copy, moment):
    """A moment's piece into scratch; the cache lines of the next are fetched meanwhile."""
    ahead, lines = address(moment, PIECE), len(moment) // LINE
    for line in range(lines):
        prefetch(ahead + np.uint64(64 * line))
        for i in range(LINE):
            copy[line * LINE + i] = moment[line * LINE + i]
    for i in range(lines * LINE, len(moment)):
        copy[i] = moment[i]


@kernel
def _add(row, moment, delta, weight):
    """A moment's piece with the row's part, in place and into scratch; the cache lines of the next are fetched meanwhile."""
    ahead, lines = address(moment, PIECE), len(moment) // LINE
    for line in range(lines):
        prefetch(ahead + np.uint64(64 * line))
        for i in range(line * LINE, (line + 1) * LINE):
            row[i] = moment[i] + delta[i] * weight
            moment[i] = row[i]
    for i in range(lines * LINE, len(moment)):
        row[i] = moment[i] + delta[i] * weight
        moment[i] = row[i]


@kernel
def _products(rows, groups, wide, sums, lanes):
    """Adds each group's inner products of rows with rows to its lane, and of the last row with itself alone; by `tree`."""
    last = len(rows) - 1
    for group in range(groups):
        begin = group * GROUP
        for j in range(last + 1):
            row, exact = rows[j], wide[j]
            for i in range(GROUP):
                exact[i] = np.float64(row[begin + i])
        pair = 0
        for j in range(last + 1):
            one = wide[j]
            for k in range(j if j == last else 0, j + 1):
                other = wide[k]
                for i in range(16):
                    first = one[i] * other[i] + one[i + 32] * other[i + 32]
                    sums[i] = first + (one[i + 16] * other[i + 16] + one[i + 48] * other[i + 48])
                for i in range(8):
                    sums[i] += sums[i + 8]
                for i in range(4):
                    sums[i] += sums[i + 4]
                lanes[pair, group] += (sums[0] + sums[2]) + (sums[1] + sums[3])
                pair += 1


@kernel
def _accumulate(origin, table, coefficients, chunk, predicted):
    """A chunk's theta_0 + sum_j b_j S_j."""
    first, end = chunk * CHUNK, min((chunk + 1) * CHUNK, len(origin))
    total = np.empty(PIECE)
    for start in range(first, end, PIECE):
        count = min(PIECE, end - start)
        for i in range(count):
            total[i] = np.float64(origin[start + i])
        for j in range(len(table)):
            moment, coefficient = numba.carray(at(table[j, 0, 0] + 4 * start), (count,), np.float32), coefficients[j]
            for i in range(count):
                total[i] += coefficient * np.float64(moment[i])
        for i in range(count):
            predicted[start - first + i] = total[i]
