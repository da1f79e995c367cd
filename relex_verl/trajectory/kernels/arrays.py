"""What kernels are given: tensors as arrays of words, and tables of where the parts of many rows lie."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from relex_verl.trajectory.encodings.packed import Row

__all__ = ["addresses", "readable", "rows_before", "words"]

Array = npt.NDArray[Any]
WORDS = {torch.float32: np.uint32, torch.bfloat16: np.uint16}


def readable(*tensors: torch.Tensor) -> bool:
    """Whether a kernel can work on them: flat, on the host, float32 or bfloat16."""
    return all(one.device.type == "cpu" and one.is_contiguous() and one.dtype in WORDS for one in tensors)


def words(tensor: torch.Tensor) -> tuple[Array, np.uint32]:
    """The bits of its elements, and by how much to shift one to the left for those of the same float32."""
    signed = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
    return signed.numpy().view(WORDS[tensor.dtype]), np.uint32(0 if tensor.dtype == torch.float32 else 16)


def addresses(parts: Sequence[Any]) -> Array:
    """(t, 2, fields) int64: where each field of each part begins and ends. The parts must outlive its use."""
    names = [field.name for field in fields(parts[0])] if parts else []
    table = np.empty((len(parts), 2, len(names)), np.int64)
    for part, (begin, end) in zip(parts, table, strict=True):
        for i, name in enumerate(names):
            array: torch.Tensor = getattr(part, name)
            begin[i] = array.data_ptr()
            end[i] = begin[i] + array.nbytes
    return table


def rows_before(rows: Sequence[Row[Any]], columns: int) -> Array:
    """`addresses` of the rows before, without a look at each of them."""
    if not rows:
        return np.empty((0, 2, columns), np.int64)
    bounds = np.stack([row.step.bounds[row.tensor : row.tensor + 2] for row in rows])
    starts, items = zip(*(row.step.layout for row in rows), strict=True)
    return np.array(starts)[:, None] + bounds * np.array(items)[:, None]
