"""`encodings.quantized`, compiled: for a row, each weight, state and stored code is read once.

Threads take chunks, and a chunk's part of the row of H is summed in an order of its own (`maths.sums`): they do not show.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from relex_verl.trajectory.encodings.packed import Row
from relex_verl.trajectory.encodings.quantized import LEVELS, QuantizedIncrement
from relex_verl.trajectory.kernels import quantized_loops as loops
from relex_verl.trajectory.kernels.arrays import addresses, readable, rows_before, words
from relex_verl.trajectory.kernels.quantized_loops import CHUNK
from relex_verl.trajectory.parallel import share

__all__ = ["accumulate", "advance", "take"]


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
            lambda chunk: loops.take_codes(old, now, shift, signed, scale, bits, top, table, chunk, sums), chunks
        )
    else:
        changed = share(lambda chunk: loops.take_changes(old, now, shift, code, table, chunk, sums), chunks)
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
        share(lambda chunk: loops.advance_codes(old, signed, scale, bits, chunk), -(-len(old) // CHUNK))
    else:
        share(lambda chunk: loops.advance_changes(old, code, chunk), -(-len(old) // CHUNK))
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
        loops.accumulate(begin, table, bits, factors, chunk, total)
        part.copy_(torch.from_numpy(total))

    share(fill, -(-len(begin) // CHUNK))
    return predicted
