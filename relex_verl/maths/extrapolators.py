"""Extrapolators as weight vectors: (G, steps, target) -> a.

Every predictor here is linear in the observed deltas of its own tensor,

    theta_hat = theta_0 + sum_t a_t delta_t = theta_last + sum_t (w_t - 1) e_t,    w_t = sum_{s >= t} a_s,

so a method is a function that returns `a`, one row a tensor, and needs no weights: only the Gram matrix G = M M^T (L, T, T)
and the real step numbers. With G = U S^2 U^T, the paper's v_1 = M^T u_1 / s_1 and c = M v_1 = s_1 u_1, the RELEX
prediction c_hat v_1 (Algorithm 2) becomes a = u_1 u_1^T l with l the hat vector of the least-squares line at the target:
no division by a singular value, no sign to choose, no singular vector in memory. A tensor that never moved (trace 0) has no
direction: its projections are 0, and whatever a is, it predicts the base.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = [
    "EXPO_ALPHA",
    "METHODS",
    "Method",
    "Prediction",
    "fit_weights",
    "increment_coefficients",
    "line_hat",
    "polynomial_hat",
    "reconstruction_weights",
    "top_eigenvectors",
]


def top_eigenvectors(gram_LTT: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The top eigenpairs of every Gram matrix of a stack, largest first.

    Args:
        gram_LTT: G, (L, T, T) float64.
        rank: r; more than T is cut down to T.

    Returns:
        U_r (L, T, r) and the eigenvalues sigma^2 (L, r), clipped at 0.

    Raises:
        ValueError: rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    values_LT, vectors_LTT = torch.linalg.eigh(gram_LTT)  # ascending
    return vectors_LTT.flip(-1)[..., :rank], values_LT.flip(-1)[..., :rank].clamp_min(0.0)


def line_hat(steps: Sequence[int], target: float) -> torch.Tensor:
    """The hat vector l of a least-squares line c(s) = a s + b over the steps, evaluated at the target (paper, step 2).

    l_t = 1/T + (target - mean s) (s_t - mean s) / sum (s - mean s)^2, so that l^T c is the extrapolated coefficient.

    Args:
        steps: the T real step numbers of the rows.
        target: the step to predict.

    Returns:
        l, (T,) float64.

    Raises:
        ValueError: fewer than two different steps (a line needs two).
    """
    return polynomial_hat(steps, target, degree=1)


def polynomial_hat(steps: Sequence[int], target: float, degree: int) -> torch.Tensor:
    """The hat vector of a least-squares polynomial of this degree over the steps, evaluated at the target.

    The basis is scaled to [-1, 1] over the steps: raw powers of step numbers would lose all digits.

    Raises:
        ValueError: fewer different steps than coefficients.
    """
    if len(set(steps)) <= degree:
        raise ValueError(f"a polynomial of degree {degree} needs {degree + 1} observed steps, got {sorted(set(steps))}")
    steps_T = torch.tensor(list(steps), dtype=torch.float64)
    centre, half = (steps_T.max() + steps_T.min()) / 2, (steps_T.max() - steps_T.min()) / 2
    powers = torch.arange(degree + 1, dtype=torch.float64)
    basis_TD = ((steps_T - centre) / half).unsqueeze(1) ** powers
    at_target_D = ((target - centre) / half) ** powers
    return torch.linalg.lstsq(basis_TD.T, at_target_D.unsqueeze(1), driver="gelsd").solution.squeeze(1)


def increment_coefficients(weights_LT: torch.Tensor) -> torch.Tensor:
    """w_t - 1 with w_t = sum_{s >= t} a_s: what each increment counts when the sum starts from theta_last.

    Args:
        weights_LT: a, (L, T).

    Returns:
        (L, T) float64; all zero where the prediction is the last observed checkpoint.
    """
    return weights_LT.flip(-1).cumsum(-1).flip(-1) - 1.0


def reconstruction_weights(gram_LTT: torch.Tensor, row: int, rank: int = 1) -> torch.Tensor:
    """Rank-r reconstruction of an observed row (paper, Algorithm 1): a = U_r U_r^T 1_row.

    Args:
        gram_LTT: G, (L, T, T).
        row: index of the observed row, 0 <= row < T.
        rank: r.

    Returns:
        a, (L, T).
    """
    return _project(gram_LTT, _unit(gram_LTT, row), rank)


# "Usually good" by its authors, who have no step axis: the target does not enter.
EXPO_ALPHA = 0.5


class Method(NamedTuple):
    """One extrapolator.

    Attributes:
        weights: (G, steps, target, rank) -> a.
        formula: of a.
        source: where it comes from.
        min_rows: observed steps that it needs.
        degree: of the polynomial over the steps that it fits, so that a sketch of more moments gives it; None for a method
            that takes single rows.
    """

    weights: Callable[..., torch.Tensor]
    formula: str
    source: str
    min_rows: int = 2
    degree: int | None = None


def _unit(gram_LTT: torch.Tensor, row: int) -> torch.Tensor:
    unit_T = torch.zeros(gram_LTT.shape[-1], dtype=gram_LTT.dtype)
    unit_T[row] = 1.0
    return unit_T


def _project(gram_LTT: torch.Tensor, hat_T: torch.Tensor, rank: int) -> torch.Tensor:
    """U_r U_r^T hat, one row a tensor; 0 where nothing moved (any direction would do there, so take none)."""
    vectors_LTr, _ = top_eigenvectors(gram_LTT, rank)
    weights_LT = (vectors_LTr @ (vectors_LTr.mT @ hat_T).unsqueeze(-1)).squeeze(-1)
    moved_L1 = gram_LTT.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) > 0
    return torch.where(moved_L1, weights_LT, 0.0)


def _same_for_all(gram_LTT: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    return weights_T.to(gram_LTT).expand(gram_LTT.shape[0], -1).clone()


def _relex(gram_LTT: torch.Tensor, steps: Sequence[int], target: float, rank: int) -> torch.Tensor:
    return _project(gram_LTT, line_hat(steps, target), rank)


def _anchored(gram_LTT: torch.Tensor, steps: Sequence[int], target: float, rank: int) -> torch.Tensor:
    change_LT = _project(gram_LTT, line_hat(steps, target) - line_hat(steps, steps[-1]), rank)
    return _unit(gram_LTT, -1) + change_LT


def _anchored_half(gram_LTT: torch.Tensor, steps: Sequence[int], target: float, rank: int) -> torch.Tensor:
    """Like `anchored`, from the rows after the middle one taken relative to it: delta_t - delta_middle = (P M)_t."""
    middle = len(steps) // 2 - 1
    late = list(steps)[middle + 1 :]
    shift_kT = torch.eye(len(steps), dtype=gram_LTT.dtype)[middle + 1 :] - _unit(gram_LTT, middle)
    gram_Lkk = shift_kT @ gram_LTT @ shift_kT.T
    change_Lk = _project(gram_Lkk, line_hat(late, target) - line_hat(late, late[-1]), rank)
    return _unit(gram_LTT, -1) + change_Lk @ shift_kT


def _poly(gram_LTT: torch.Tensor, steps: Sequence[int], target: float, rank: int) -> torch.Tensor:
    return _project(gram_LTT, polynomial_hat(steps, target, degree=3), rank)


def _raw_ols(gram_LTT: torch.Tensor, steps: Sequence[int], target: float, rank: int) -> torch.Tensor:
    return _same_for_all(gram_LTT, line_hat(steps, target))


def _two_point(gram_LTT: torch.Tensor, steps: Sequence[int], target: float, rank: int) -> torch.Tensor:
    return _same_for_all(gram_LTT, _unit(gram_LTT, -1) * (target / steps[-1]))


def _first_step(gram_LTT: torch.Tensor, steps: Sequence[int], target: float, rank: int) -> torch.Tensor:
    return _same_for_all(gram_LTT, _unit(gram_LTT, 0) * (target / steps[0]))


def _expo(gram_LTT: torch.Tensor, steps: Sequence[int], target: float, rank: int) -> torch.Tensor:
    return _same_for_all(gram_LTT, _unit(gram_LTT, -1) * (1.0 + EXPO_ALPHA))


def _hold(gram_LTT: torch.Tensor, steps: Sequence[int], target: float, rank: int) -> torch.Tensor:
    return _same_for_all(gram_LTT, _unit(gram_LTT, -1))


METHODS: dict[str, Method] = {
    "relex": Method(_relex, "U U^T l(target)", "Wei et al. 2026, Algorithm 2, arXiv:2605.21468", degree=1),
    "anchored": Method(_anchored, "1_T + U U^T (l(target) - l(s_T))", "ours: keeps what rank r leaves out of theta_T"),
    "anchored-half": Method(
        _anchored_half, "anchored, U and l from the rows after the middle one, relative to it", "ours", min_rows=4
    ),
    "two-point": Method(
        _two_point, "(target / s_T) 1_T", "Wang et al. 2026, Weight Extrapolation, arXiv:2601.04537", 1
    ),
    "first-step": Method(_first_step, "(target / s_1) 1_1", "basetenlabs/relex-replication: W_0 + k (W_1 - W_0)", 1),
    "raw-ols": Method(_raw_ols, "l(target)", "least squares on every raw weight; relex with rank T", degree=1),
    "expo": Method(_expo, "(1 + 0.5) 1_T, whatever the target", "Zheng et al. 2025, ExPO, arXiv:2404.16792", 1),
    "poly": Method(_poly, "U U^T p(target), p cubic", "Wei et al. 2026, Table 2, arXiv:2605.21468", 4, 3),
    "hold": Method(_hold, "1_T", "the last observed checkpoint: what every prediction has to beat", 1),
}


@dataclass(frozen=True)
class Prediction:
    """What to predict: one method, one target step, from the rows from step `fit_from` on."""

    method: str
    target: int
    rank: int = 1
    fit_from: int = 0

    @property
    def folder_name(self) -> str:
        """Name of its checkpoint folder."""
        return f"{self.method}-step_{self.target}"


def fit_weights(
    gram_LTT: torch.Tensor, steps: Sequence[int], target: float, method: str, rank: int = 1, fit_from: int = 0
) -> torch.Tensor:
    """a of a method fitted on the rows from step `fit_from` on; rows before it (a warm-up) get weight 0.

    Args:
        gram_LTT: G, (L, T, T).
        steps: the T real step numbers, ascending.
        target: the step to predict.
        method: a name in METHODS.
        rank: r.
        fit_from: first step that takes part in the fit.

    Returns:
        a, (L, T) float64.

    Raises:
        ValueError: too few rows are left for the method.
    """
    skipped = sum(step < fit_from for step in steps)
    rows = len(steps) - skipped
    if rows < METHODS[method].min_rows:
        raise ValueError(
            f"{method} needs {METHODS[method].min_rows} observed steps from {fit_from} on, there are {rows}"
        )
    fitted_LT = METHODS[method].weights(gram_LTT[:, skipped:, skipped:], list(steps)[skipped:], target, rank)
    return torch.nn.functional.pad(fitted_LT, (skipped, 0))
