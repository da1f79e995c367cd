"""How one increment of one tensor is kept: the table of encodings, all with the same five operations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from relex_verl.encodings import quantized, sparse
from relex_verl.encodings.packed import PackedStep, StoredStep

__all__ = ["ENCODINGS", "Encoding", "PackedStep", "StoredStep", "encoding_name"]


@dataclass(frozen=True)
class Encoding:
    """One way to follow the weights.

    Attributes:
        dtype: of the state that increments are taken from and applied to.
        increment: type of an increment; it has `changed`, the number of elements that changed.
        encode: (state, new weights) -> increment.
        advance: (state, increment) -> None, in place.
        dots: (increments, numel, device) -> the new row of H, (t,).
        accumulate: (last state, increments, coefficients) -> predicted weights, bfloat16.
        error_bound: (increment) -> how far an element of the state can be from the weights after it.
        state_bytes: host memory a parameter for the state.
        row_bytes: host memory a parameter for each row, given the share of bf16 weights that change.
    """

    dtype: torch.dtype
    increment: type
    encode: Callable[..., Any]
    advance: Callable[..., None]
    dots: Callable[..., torch.Tensor]
    accumulate: Callable[..., torch.Tensor]
    error_bound: Callable[..., float]
    state_bytes: int
    row_bytes: Callable[[float], float]


def _quantized(bits: int) -> Encoding:
    row_bytes = bits / 8 + 4 / quantized.GROUP if bits else 4.0
    return Encoding(
        torch.float32,
        quantized.QuantizedIncrement,
        partial(quantized.encode, bits=bits),
        quantized.advance,
        quantized.dots,
        quantized.accumulate,
        quantized.error_bound,
        state_bytes=4,
        row_bytes=lambda change_rate: row_bytes,
    )


ENCODINGS: dict[str, Encoding] = {
    "bf16": Encoding(
        torch.bfloat16,
        sparse.SparseIncrement,
        sparse.encode,
        sparse.advance,
        sparse.dots,
        sparse.accumulate,
        error_bound=lambda increment: 0.0,
        state_bytes=2,
        row_bytes=lambda change_rate: 4 * change_rate,
    ),
    "fp32-int8": _quantized(8),
    "fp32-int4": _quantized(4),
    "fp32-none": _quantized(0),
}


def encoding_name(trajectory: str, quantization: str) -> str:
    """The encoding of `relex.trajectory` and `relex.quantization`."""
    return trajectory if trajectory == "bf16" else f"{trajectory}-{quantization}"
