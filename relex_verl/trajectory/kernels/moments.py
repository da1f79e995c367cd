# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""`encodings.moments`, compiled: each moment is read and written once for a row."""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch

from relex_verl.trajectory.encodings.moments import CHUNK, GROUP, Moment
from relex_verl.trajectory.kernels.arrays import addresses, readable, words
from relex_verl.trajectory.kernels.compile import at, kernel, tree
from relex_verl.trajectory.parallel import share

__all__ = ["accumulate", "add_row"]

LANES = 64
PIECE = GROUP * LANES
INFINITE = np.uint32(0x7F800000)


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
    words = np.empty(PIECE, np.uint32)
    delta, rows = words.view(np.float32), np.empty((size + 1, PIECE), np.float32)
    before = np.empty((size, PIECE), np.float32)
    products = np.empty(GROUP)
    lanes = np.zeros((sums.shape[1], LANES))
    first, end = chunk * CHUNK, min((chunk + 1) * CHUNK, len(origin))
    for start in range(first, end, PIECE):
        count = min(PIECE, end - start)
        groups = -(-count // GROUP)
        for i in range(count):
            words[i] = np.uint32(now[start + i]) << shift
        largest = np.uint32(0)
        for i in range(count):
            delta[i] -= origin[start + i]
        for i in range(count):
            largest = max(largest, np.uint32(words[i] & np.uint32(0x7FFFFFFF)))
        if largest >= INFINITE:
            return False
        rows[:, count : groups * GROUP] = np.float32(0)
        for j in range(size):
            moment = numba.carray(at(table[j, 0, 0] + 4 * start), (count,), np.float32)
            before[j, :count] = moment
        for j in range(size):
            moment = numba.carray(at(table[j, 0, 0] + 4 * start), (count,), np.float32)
            weight, row = weights[j], rows[j]
            if len(mixed):
                factor, other = mixed[j, 0], before[0]
                for i in range(count):
                    row[i] = other[i] * factor
                for k in range(1, size):
                    factor, other = mixed[j, k], before[k]
                    for i in range(count):
                        row[i] += other[i] * factor
                for i in range(count):
                    row[i] += delta[i] * weight
            else:
                other = before[j]
                for i in range(count):
                    row[i] = other[i] + delta[i] * weight
            moment[:] = row[:count]
        rows[size, :count] = delta[:count]
        pair = 0
        for j in range(size + 1):
            one = rows[j]
            for k in range(j if j == size else 0, j + 1):
                other = rows[k]
                for group in range(groups):
                    begin = group * GROUP
                    for i in range(GROUP):
                        products[i] = np.float64(one[begin + i]) * np.float64(other[begin + i])
                    lanes[pair, group] += tree(products)
                pair += 1
    for pair in range(len(lanes)):
        sums[chunk, pair] = tree(lanes[pair])
    return True


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
