"""`sketch`: the moments of a window over polynomials in the step, see `relex_verl.maths.sketch`; uncompressed float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Moment", "accumulate"]

CHUNK = 2**20  # elements whose float64 scratch (8 MiB) stays near the caches


@dataclass(frozen=True)
class Moment:
    """sum_t P_j(x_t) delta_t of one flat shard of n elements.

    Attributes:
        value: (n,) float32.
    """

    value: torch.Tensor


def accumulate(
    origin: torch.Tensor,
    moments: Sequence[Moment],
    coefficients: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """theta_0 + sum_j b_j S_j in float64, rounded once.

    Args:
        origin: (n,) theta_0.
        moments: S_0 .. S_{r-1}.
        coefficients: b.
        dtype: to round to.

    Returns:
        (n,) of that dtype on the host, the predicted weights.
    """
    predicted = torch.empty(origin.shape, dtype=dtype)
    for start in range(0, len(origin), CHUNK):
        piece = slice(start, start + CHUNK)
        total = origin[piece].double()
        for moment, coefficient in zip(moments, coefficients, strict=True):
            total += coefficient * moment.value[piece].double()
        predicted[piece] = total.to(dtype)
    return predicted
