"""Whether what a file holds is of a shard of so many elements: kernels go by addresses, and a file may be anybody's."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from relex_verl.trajectory.encodings import quantized, sparse
from relex_verl.trajectory.encodings.moments import Moment
from relex_verl.trajectory.encodings.quantized import QuantizedIncrement
from relex_verl.trajectory.encodings.sparse import SparseIncrement

__all__ = ["check_fits"]

SPARSE = [torch.int32, torch.int16, torch.bfloat16, torch.int64, torch.bfloat16, torch.bfloat16]


def check_fits(part: Any, numel: int, kind: type) -> None:
    """Compare an increment, or a moment, with the shard that it is to be used with, and the type that is kept of it.

    Raises:
        ValueError: it is that of another shard, or of none.
    """
    fits: dict[type, Callable[[Any, int], bool]] = {
        SparseIncrement: _sparse, QuantizedIncrement: _quantized, Moment: _moment,
    }  # fmt: skip
    if type(part) is not kind or not fits[kind](part, numel):
        raise ValueError(f"what is kept of it is not of {numel} elements")


def _moment(moment: Moment, numel: int) -> bool:
    return moment.value.dtype == torch.float32 and len(moment.value) == numel


def _quantized(increment: QuantizedIncrement, numel: int) -> bool:
    if increment.code.dtype not in quantized.DTYPES.values() or increment.scale.dtype != torch.float32:
        return False
    groups = -(-numel // quantized.GROUP)
    padded = quantized.GROUP * groups
    lengths = {8: (padded, groups), 4: (padded // 2, groups), 0: (numel, 0)}
    return (len(increment.code), len(increment.scale)) == lengths[increment.bits]


def _sparse(increment: SparseIncrement, numel: int) -> bool:
    counts, odd = increment.block_count, increment.exception_index
    if [getattr(increment, field.name).dtype for field in fields(increment)] != SPARSE:
        return False
    if len(counts) != -(-numel // sparse.BLOCK) or bool((counts < 0).any()):
        return False
    if not len(increment.index) == len(increment.value) == int(counts.sum()):
        return False
    if not len(odd) == len(increment.exception_old) == len(increment.exception_new):
        return False
    if bool(((odd < 0) | (odd >= numel)).any()):
        return False
    # Every block but the last has a place for each 16-bit offset.
    in_last = int(counts[-1]) if len(counts) else 0
    offsets = increment.index[len(increment.index) - in_last :].int() & 0xFFFF
    return not bool((offsets >= numel - (len(counts) - 1) * sparse.BLOCK).any())
