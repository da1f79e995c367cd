"""`sketch`: the moments of a window over polynomials in the step, see `relex_verl.maths.sketch`; uncompressed float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from relex_verl.maths.sums import in_lanes, tree

__all__ = ["Moment", "accumulate", "add_row"]

GROUP = 64
CHUNK = 4096 * GROUP  # elements whose float64 scratch stays near the caches


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


def add_row(
    origin: torch.Tensor,
    now: torch.Tensor,
    moments: Sequence[Moment],
    weights: Sequence[float],
    change: torch.Tensor | None,
) -> torch.Tensor:
    """Add one row to the moments of a shard, in place; a piece at a time, so that memory is read and written once.

    Sums over the elements are in the order of `maths.sums`, in groups of 64 first, and the chunks one after another.

    Args:
        origin: (n,) float32, theta_0.
        now: (n,) the weights, on any device.
        moments: r of them.
        weights: P_j of the row.
        change: (r, r) of `rebase`, when the interval has grown.

    Returns:
        (r^2 + 1,) float64: S S^T, and the square of the row's norm.

    Raises:
        ValueError: weights that are not finite.
    """
    size = len(moments)
    pairs = [(j, k) for j in range(size) for k in range(j + 1)]
    sums = torch.zeros(len(pairs) + 1, dtype=torch.float64)
    for start in range(0, len(origin), CHUNK):
        piece = slice(start, min(start + CHUNK, len(origin)))
        delta = now[piece].to("cpu", torch.float32) - origin[piece]
        if not delta.isfinite().all():
            raise ValueError("weights are not finite (NaN or infinity): the training run itself has diverged")
        rows = [moment.value[piece] for moment in moments]
        if change is not None:
            rows = [_combined(rows, factors) for factors in change.float().tolist()]
        rows = [row + delta * weight for row, weight in zip(rows, weights, strict=True)]
        for moment, row in zip(moments, rows, strict=True):
            moment.value[piece] = row
        exact = [row.double() for row in rows]
        for i, (j, k) in enumerate(pairs):
            sums[i] += _sum(exact[j] * exact[k])
        sums[-1] += _sum(delta.double().square())
    gram_rr = torch.zeros(size, size, dtype=torch.float64)
    for i, (j, k) in enumerate(pairs):
        gram_rr[j, k] = gram_rr[k, j] = sums[i]
    return torch.cat([gram_rr.flatten(), sums[-1:]])


def _combined(rows: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """sum_k f_k row_k in float32, one after another: a library's product rounds as the processor has it."""
    total = rows[0] * factors[0]
    for row, factor in zip(rows[1:], factors[1:], strict=True):
        total = total + row * factor
    return total


def _sum(values: torch.Tensor) -> torch.Tensor:
    return in_lanes(tree(torch.nn.functional.pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)))
