"""Extrapolators as weight vectors: (window, target) -> a.

Every predictor here is linear in the observed deltas of its own tensor,

    theta_hat = theta_0 + sum_t a_t delta_t = theta_last + sum_t (w_t - 1) e_t,    w_t = sum_{s >= t} a_s,

so a method is a function that returns `a`, one row a tensor, and needs no weights: only a `Window`, that is the Gram matrix
G = M M^T (L, T, T), the real steps and the origin step. With G = U S^2 U^T, v_1 = M^T u_1 / s_1, c = M v_1 = s_1 u_1, its
prediction c_hat v_1 (Algorithm 2) becomes a = u_1 u_1^T l with l the hat vector of the least-squares line at the target:
no division by a singular value, no sign to choose, no singular vector in memory. A tensor that never moved (trace 0) has no
direction: its projections are 0, and whatever a is, it predicts the base.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from relex_verl.maths.window import Window

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


def reconstruction_weights(window: Window, step: int, rank: int = 1) -> torch.Tensor:
    """Rank-r reconstruction of an observed row (paper, Algorithm 1): a = U_r U_r^T 1_row.

    Args:
        window: whose rows span the directions.
        step: one of its steps.
        rank: r.

    Returns:
        a, (L, T).

    Raises:
        ValueError: the step is not among the window's.
    """
    row = list(window.steps).index(step)
    return _project(window.gram_LTT, _unit(window.rows, row), rank)


# "Usually good" by its authors, who have no step axis: the target does not enter.
EXPO_ALPHA = 0.5


class Method(NamedTuple):
    """One extrapolator: all that anything here knows of it.

    Attributes:
        weights: (window, target, rank) -> a (L, T).
        formula: of a; o is the origin step.
        source: where it comes from.
        min_rows: observed steps that it needs.
        degree: of the polynomial over the steps that it fits, so that a sketch of more moments gives it; None for a method
            that takes single rows.
        along_v1: it follows the first singular direction, and is worth nothing where there is none.
        step_axis: its prediction depends on the target step, or is a constant over the steps, so that a backtest at a step
            says something of it.
    """

    weights: Callable[[Window, float, int], torch.Tensor]
    formula: str
    source: str
    min_rows: int = 2
    degree: int | None = None
    along_v1: bool = False
    step_axis: bool = True


def _unit(rows: int, row: int) -> torch.Tensor:
    unit_T = torch.zeros(rows, dtype=torch.float64)
    unit_T[row] = 1.0
    return unit_T


def _project(gram_LTT: torch.Tensor, hat_T: torch.Tensor, rank: int) -> torch.Tensor:
    """U_r U_r^T hat, one row a tensor; 0 where nothing moved (any direction would do there, so take none)."""
    vectors_LTr, _ = top_eigenvectors(gram_LTT, rank)
    weights_LT = (vectors_LTr @ (vectors_LTr.mT @ hat_T).unsqueeze(-1)).squeeze(-1)
    moved_L1 = gram_LTT.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) > 0
    return torch.where(moved_L1, weights_LT, 0.0)


def _same_for_all(window: Window, weights_T: torch.Tensor) -> torch.Tensor:
    return weights_T.to(window.gram_LTT).expand(len(window.names), -1).clone()


def _relex(window: Window, target: float, rank: int) -> torch.Tensor:
    return _project(window.gram_LTT, line_hat(window.steps, target), rank)


def _anchored(window: Window, target: float, rank: int) -> torch.Tensor:
    change_T = line_hat(window.steps, target) - line_hat(window.steps, window.steps[-1])
    return _unit(window.rows, -1) + _project(window.gram_LTT, change_T, rank)


def _anchored_half(window: Window, target: float, rank: int) -> torch.Tensor:
    """Like `anchored`, from the rows after the middle one taken relative to it: delta_t - delta_middle = (P M)_t."""
    rows, middle = window.rows, window.rows // 2 - 1
    late = list(window.steps)[middle + 1 :]
    shift_kT = torch.eye(rows, dtype=torch.float64)[middle + 1 :] - _unit(rows, middle)
    gram_Lkk = shift_kT @ window.gram_LTT @ shift_kT.T
    change_Lk = _project(gram_Lkk, line_hat(late, target) - line_hat(late, late[-1]), rank)
    return _unit(rows, -1) + change_Lk @ shift_kT


def _poly(window: Window, target: float, rank: int) -> torch.Tensor:
    return _project(window.gram_LTT, polynomial_hat(window.steps, target, degree=3), rank)


def _raw_ols(window: Window, target: float, rank: int) -> torch.Tensor:
    return _same_for_all(window, line_hat(window.steps, target))


def _from_origin(window: Window, target: float, row: int) -> torch.Tensor:
    """The line through the origin and one row."""
    factor = (target - window.origin_step) / window.distances[row]
    return _same_for_all(window, factor * _unit(window.rows, row))


def _two_point(window: Window, target: float, rank: int) -> torch.Tensor:
    return _from_origin(window, target, -1)


def _first_step(window: Window, target: float, rank: int) -> torch.Tensor:
    return _from_origin(window, target, 0)


def _expo(window: Window, target: float, rank: int) -> torch.Tensor:
    return _same_for_all(window, (1.0 + EXPO_ALPHA) * _unit(window.rows, -1))


def _hold(window: Window, target: float, rank: int) -> torch.Tensor:
    return _same_for_all(window, _unit(window.rows, -1))


METHODS: dict[str, Method] = {
    "relex": Method(
        _relex, "U U^T l(target)", "Wei et al. 2026, Algorithm 2, arXiv:2605.21468", degree=1, along_v1=True
    ),
    "anchored": Method(
        _anchored, "1_T + U U^T (l(target) - l(s_T))", "ours: keeps what rank r leaves out of theta_T", along_v1=True
    ),
    "anchored-half": Method(
        _anchored_half,
        "anchored, U and l from the rows after the middle one, relative to it",
        "ours",
        min_rows=4,
        along_v1=True,
    ),
    "two-point": Method(
        _two_point,
        "(target - o) / (s_T - o) 1_T",
        "Wang et al. 2026, Weight Extrapolation, arXiv:2601.04537",
        min_rows=1,
    ),
    "first-step": Method(
        _first_step,
        "(target - o) / (s_1 - o) 1_1",
        "basetenlabs/relex-replication: W_0 + k (W_1 - W_0)",
        min_rows=1,
    ),
    "raw-ols": Method(_raw_ols, "l(target)", "least squares on every raw weight; relex with rank T", degree=1),
    "expo": Method(
        _expo,
        "(1 + 0.5) 1_T, whatever the target",
        "Zheng et al. 2025, ExPO, arXiv:2404.16792",
        min_rows=1,
        step_axis=False,
    ),
    "poly": Method(
        _poly,
        "U U^T p(target), p cubic",
        "Wei et al. 2026, Table 2, arXiv:2605.21468",
        min_rows=4,
        degree=3,
        along_v1=True,
    ),
    "hold": Method(_hold, "1_T", "the last observed checkpoint: what every prediction has to beat", min_rows=1),
}


@dataclass(frozen=True)
class Prediction:
    """What to predict: one method, one target step, from the rows from step `fit_from` on (0 and 1 are all of them)."""

    method: str
    target: int
    rank: int = 1
    fit_from: int = 1

    @property
    def folder_name(self) -> str:
        """Name of its checkpoint folder."""
        return f"{self.method}-step_{self.target}"


def fit_weights(window: Window, prediction: Prediction) -> torch.Tensor:
    """a of a prediction, fitted on the rows from its `fit_from` on; rows before (a warm-up) get weight 0.

    Args:
        window: all rows.
        prediction: the method, its rank, the target, and the first step that takes part.

    Returns:
        a, (L, T) float64.

    Raises:
        ValueError: too few rows are left for the method.
    """
    method, fit_from = METHODS[prediction.method], prediction.fit_from
    rows = sum(step >= fit_from for step in window.steps)
    if rows < method.min_rows:
        raise ValueError(
            f"{prediction.method} needs {method.min_rows} observed steps from {fit_from} on, there are {rows}"
        )
    weights_LT = method.weights(window.since(fit_from), prediction.target, prediction.rank)
    return torch.nn.functional.pad(weights_LT, (window.rows - rows, 0))
