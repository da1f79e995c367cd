"""The top singular triple of a matrix, and of the differences between the observed states of one tensor."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

__all__ = ["RankOne", "differences", "rank_one", "same_sign"]

EXACT_UP_TO = 256  # smaller side of a matrix whose full SVD is cheap
BLOCK, MAX_ITERATIONS, TOLERANCE = 8, 50, 1e-5


class RankOne(NamedTuple):
    """s u v^T, the best rank-1 approximation of a matrix (m, n); all zero for a zero matrix.

    Attributes:
        left: u, (m,) float32 of norm 1.
        value: s >= 0.
        right: v, (n,) float32 of norm 1.
    """

    left: torch.Tensor
    value: float
    right: torch.Tensor

    def flipped(self) -> "RankOne":
        """The same matrix with the signs of u and v exchanged."""
        return RankOne(-self.left, self.value, -self.right)

    def matrix(self) -> torch.Tensor:
        """s u v^T, (m, n) float32."""
        return torch.outer(self.left * self.value, self.right)


def same_sign(factors: RankOne, reference: RankOne) -> RankOne:
    """`one`, flipped if that brings it nearer to the reference: cos(u, u') + cos(v, v') >= 0 afterwards."""
    agreement = factors.left @ reference.left + factors.right @ reference.right
    return factors.flipped() if agreement < 0 else factors


def rank_one(matrix_mn: torch.Tensor) -> RankOne:
    """The top singular triple, deterministic: the entry of u that is largest in magnitude is positive.

    Small matrices by LAPACK's SVD in float64. Large ones by block power iteration on A^T A (8 columns, a fixed start)
    until |A v - s u| <= 1e-5 s; where that does not come (nearly equal singular values), from the
    eigenvectors of the smaller Gram matrix in float64.

    Args:
        matrix_mn: A, (m, n), any floating dtype.

    Raises:
        ValueError: not a matrix, or not finite.
    """
    if matrix_mn.ndim != 2:
        raise ValueError(f"need a matrix, got a tensor of shape {[*matrix_mn.shape]}")
    if not matrix_mn.isfinite().all():
        raise ValueError("the matrix has elements that are not finite")
    if not matrix_mn.any():
        return RankOne(torch.zeros(matrix_mn.shape[0]), 0.0, torch.zeros(matrix_mn.shape[1]))
    decomposed = _exact(matrix_mn) if min(matrix_mn.shape) <= EXACT_UP_TO else _iterated(matrix_mn.float())
    factors = decomposed if decomposed is not None else _by_gram(matrix_mn)
    return factors if factors.left[factors.left.abs().argmax()] > 0 else factors.flipped()


def _exact(matrix_mn: torch.Tensor) -> RankOne:
    left, values, right = torch.linalg.svd(matrix_mn.double(), full_matrices=False)
    return RankOne(left[:, 0].float(), values[0].item(), right[0].float())


def _iterated(matrix_mn: torch.Tensor) -> RankOne | None:
    """Rayleigh-Ritz over the iterated block; None if it has not converged."""
    generator = torch.Generator().manual_seed(0)
    block_nb = torch.randn(matrix_mn.shape[1], BLOCK, generator=generator)
    left_mb = torch.linalg.qr(matrix_mn @ block_nb).Q
    for _ in range(MAX_ITERATIONS):
        # A ~ Q (Q^T A): the SVD of the thin factor gives the Ritz triples, for which A^T u = s v holds exactly.
        right_nb, values_b, turn_bb = torch.linalg.svd(matrix_mn.T @ left_mb, full_matrices=False)
        left_m, right_n, value = left_mb @ turn_bb[0], right_nb[:, 0], values_b[0]
        image_mb = matrix_mn @ right_nb
        if torch.linalg.vector_norm(image_mb[:, 0] - value * left_m) <= TOLERANCE * value:
            return RankOne(left_m, value.item(), right_n)
        left_mb = torch.linalg.qr(image_mb).Q
    return None


def _by_gram(matrix_mn: torch.Tensor) -> RankOne:
    wide = matrix_mn.shape[0] <= matrix_mn.shape[1]
    side = (matrix_mn if wide else matrix_mn.T).double()
    near = torch.linalg.eigh(side @ side.T).eigenvectors[:, -1]
    far = side.T @ near
    value = torch.linalg.vector_norm(far)
    left, right = (near, far / value) if wide else (far / value, near)
    return RankOne(left.float(), value.item(), right.float())


def differences(
    states: Iterable[tuple[int, torch.Tensor]], pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], RankOne]:
    """rank_one(theta_b - theta_a) for each pair of steps (a, b), in one walk over the states of a tensor.

    Memory: the states that are the first of a pair whose second is still to come.

    Args:
        states: (step, matrix) in ascending order of the steps, as `WholeTensors.states` gives them.
        pairs: steps (a, b), a < b.

    Raises:
        ValueError: a pair names a step that is not among the states, or not in that order.
    """
    by_pair: dict[tuple[int, int], RankOne] = {}
    live: dict[int, torch.Tensor] = {}
    last_use = {a: max(b for first, b in pairs if first == a) for a, _ in pairs}
    for step, state in states:
        for pair in pairs:
            if pair[1] == step and pair[0] in live:
                by_pair[pair] = rank_one(state.float() - live[pair[0]].float())
        live = {first: kept for first, kept in live.items() if last_use[first] > step}
        if last_use.get(step, step) > step:
            live[step] = state
    missing = [pair for pair in pairs if pair not in by_pair]
    if missing:
        raise ValueError(f"no difference between the steps {missing[0]}: both have to be observed, in that order")
    return by_pair
