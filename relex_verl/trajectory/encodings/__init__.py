"""How a trajectory is kept: the table of encodings.

Most keep rows: one increment of every tensor for each observed step. A sketch keeps the moments of the whole window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from relex_verl.maths.extrapolators import increment_coefficients
from relex_verl.maths.sketch import SIZES, lift
from relex_verl.trajectory.encodings import moments, quantized, sparse
from relex_verl.trajectory.encodings.packed import PackedStep, Packing, StoredStep

__all__ = [
    "ENCODINGS",
    "ROW_ENCODINGS",
    "Encoding",
    "PackedStep",
    "Packing",
    "RowEncoding",
    "SketchEncoding",
    "StoredStep",
    "encoding_name",
]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One way to follow the weights.

    Attributes:
        dtype: of the state and of the anchor.
        part: type of what is kept of a shard, several of them: increments or moments.
        coefficients: (a (L, T), steps) -> c (L, K), one for each part.
        accumulate: (anchor, parts, c) -> predicted weights, bfloat16.
        state_bytes: host memory a parameter for the state that the next step is compared with.
        row_bytes: bytes a parameter for each row, given the share of bf16 weights that change; 0 for a sketch.
        fixed_bytes: bytes a parameter that do not depend on the number of rows; 0 where rows are kept.
    """

    dtype: torch.dtype
    part: type
    coefficients: Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
    accumulate: Callable[..., torch.Tensor]
    state_bytes: int
    row_bytes: Callable[[float], float] = lambda change_rate: 0.0
    fixed_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class RowEncoding(Encoding):
    """Keeps every row: an increment from one row to the next. The state is the last row.

    Attributes:
        anchor_is_last: predictions start from the last row, with c_t = w_t - 1; else from theta_0, with c = a.
        encode: (state, new weights) -> increment; it has `changed`, the number of elements that changed.
        advance: (state, increment) -> None, in place.
        dots: (increments, numel, device) -> the new row of H, (t,).
        error_bound: (increment) -> how far an element of the state can be from the weights after it.
        sizes: (elements of each shard) -> elements of each field of their increments together, where they are known.
    """

    anchor_is_last: bool
    encode: Callable[..., Any]
    advance: Callable[..., None]
    dots: Callable[..., torch.Tensor]
    error_bound: Callable[..., float]
    sizes: Callable[[Sequence[int]], dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class SketchEncoding(Encoding):
    """Keeps `size` moments over the steps (`relex_verl.maths.sketch`), not the rows. State and anchor are theta_0."""

    size: int


def _from_last(weights_LT: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    return increment_coefficients(weights_LT)


def _from_origin(weights_LT: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    return weights_LT


def _from_moments(weights_LT: torch.Tensor, steps: Sequence[int], size: int) -> torch.Tensor:
    return weights_LT @ lift(steps, size)


def _quantized(bits: int) -> RowEncoding:
    row_bytes = bits / 8 + 4 / quantized.GROUP if bits else 4.0
    return RowEncoding(
        dtype=torch.float32,
        part=quantized.QuantizedIncrement,
        coefficients=_from_origin,
        accumulate=quantized.accumulate,
        anchor_is_last=False,
        state_bytes=4,
        row_bytes=lambda change_rate: row_bytes,
        encode=partial(quantized.encode, bits=bits),
        advance=quantized.advance,
        dots=quantized.dots,
        error_bound=quantized.error_bound,
        sizes=partial(quantized.sizes, bits=bits),
    )


def _sketch(size: int) -> SketchEncoding:
    return SketchEncoding(
        dtype=torch.float32,
        part=moments.Moment,
        coefficients=partial(_from_moments, size=size),
        accumulate=moments.accumulate,
        state_bytes=4,
        fixed_bytes=4 * size,
        size=size,
    )


ROW_ENCODINGS: dict[str, RowEncoding] = {
    "bf16": RowEncoding(
        dtype=torch.bfloat16,
        part=sparse.SparseIncrement,
        coefficients=_from_last,
        accumulate=sparse.accumulate,
        state_bytes=2,
        row_bytes=lambda change_rate: 4 * change_rate,
        anchor_is_last=True,
        error_bound=lambda increment: 0.0,
        sizes=lambda numels: {},  # known when the changes are
        encode=sparse.encode,
        advance=sparse.advance,
        dots=sparse.dots,
    ),
    "fp32-int8": _quantized(8),
    "fp32-int4": _quantized(4),
    "fp32-none": _quantized(0),
}

ENCODINGS: dict[str, Encoding] = {**ROW_ENCODINGS, **{f"sketch-{size}": _sketch(size) for size in SIZES}}


def encoding_name(trajectory: str, quantization: str, sketch_size: int = 4) -> str:
    """The encoding of `relex.trajectory`, `relex.quantization` and `relex.sketch_size`."""
    return {"bf16": "bf16", "fp32": f"fp32-{quantization}", "sketch": f"sketch-{sketch_size}"}[trajectory]
