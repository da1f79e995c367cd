"""What the Gram matrix says about a trajectory, each figure beside what a pure random walk would show.

Every function takes a stack G (L, T, T) float64 of delta Gram matrices and returns one value a tensor, (L,). A tensor
that never moved has no direction: its diagnostics are NaN ("not defined"), never 0. Explained variance and R^2 alone say
little (a random walk in many dimensions scores 0.81 and 0.96), hence `random_walk`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from relex_verl.maths.extrapolators import METHODS, line_hat
from relex_verl.maths.window import Window

__all__ = [
    "Spectrum",
    "backtest_error",
    "backtest_prefixes",
    "backtest_ratio",
    "coefficients",
    "describe",
    "direction_drift",
    "explained_variance",
    "half_backtest",
    "line_r2",
    "random_walk",
    "spectral_gap",
    "spectrum",
    "split_half_agreement",
    "summary",
]


class Spectrum(NamedTuple):
    """G with its eigenpairs, largest first: sigma^2 (L, T) and U (L, T, T). Decomposed once, read by many."""

    gram_LTT: torch.Tensor
    values_LT: torch.Tensor
    vectors_LTT: torch.Tensor


def spectrum(gram_LTT: torch.Tensor) -> Spectrum:
    """Decompose a stack of Gram matrices; eigenvalues that rounding made negative become 0."""
    values_LT, vectors_LTT = torch.linalg.eigh(gram_LTT)
    return Spectrum(gram_LTT, values_LT.flip(-1).clamp_min(0.0), vectors_LTT.flip(-1))


def random_walk(window: Window) -> Window:
    """A random walk over the same steps, from the same origin o: one tensor with G_ij = min(s_i, s_j) - o, up to scale.

    In the limit of many dimensions: independent increments are orthogonal there, so <delta_i, delta_j> is the length of the
    shared prefix.
    """
    reach_T = torch.tensor(window.distances, dtype=torch.float64)
    gram_1TT = torch.minimum(reach_T.unsqueeze(0), reach_T.unsqueeze(1)).unsqueeze(0)
    return Window(["random walk"], window.steps, gram_1TT, window.origin_step)


def explained_variance(of: Spectrum, rank: int = 1, energy_L: torch.Tensor | None = None) -> torch.Tensor:
    """Share of sum_t |delta_t|^2 in the top r directions: sum_{i<=r} sigma_i^2 / trace G (paper, section 3.1); (L,).

    Args:
        of: of the rows.
        rank: r.
        energy_L: sum_t |delta_t|^2 of the window; trace G for None. More than that for a sketch: then a lower bound.
    """
    return of.values_LT[:, :rank].sum(-1) / (_trace(of.gram_LTT) if energy_L is None else energy_L)


def spectral_gap(of: Spectrum) -> torch.Tensor:
    """(sigma_1 - sigma_2) / sigma_1: 1 for a straight line, 0 for two equal directions; (L,), NaN for one row."""
    if of.values_LT.shape[-1] < 2:
        return torch.full(of.values_LT.shape[:1], torch.nan, dtype=torch.float64)
    sigma_LT = of.values_LT.sqrt()
    return (sigma_LT[:, 0] - sigma_LT[:, 1]) / sigma_LT[:, 0]


def coefficients(of: Spectrum) -> torch.Tensor:
    """c_t = <delta_t, v_1> = sigma_1 u_1 (paper, section 3.2), signed so that the last one is not negative; (L, T)."""
    coefficients_LT = of.vectors_LTT[..., 0] * of.values_LT[:, :1].sqrt()
    return torch.where(coefficients_LT[:, -1:] < 0, -coefficients_LT, coefficients_LT)


def line_r2(of: Spectrum, steps: Sequence[int]) -> torch.Tensor:
    """R^2 of the least-squares line through the rank-1 coefficients (paper, Finding 2); (L,), NaN below 3 rows."""
    if len(steps) < 3:
        return torch.full(of.values_LT.shape[:1], torch.nan, dtype=torch.float64)
    coefficients_LT = coefficients(of)
    hat_TT = torch.stack([line_hat(steps, step) for step in steps])
    residual_LT = coefficients_LT - coefficients_LT @ hat_TT.T
    spread_L = (coefficients_LT - coefficients_LT.mean(-1, keepdim=True)).square().sum(-1)
    # Coefficients that are equal up to rounding (a tensor that moved once) have no line to explain.
    flat_L = spread_L <= 1e-24 * coefficients_LT.square().sum(-1)
    return torch.where(flat_L, torch.nan, 1.0 - residual_LT.square().sum(-1) / spread_L)


def direction_drift(early: Spectrum, late: Spectrum) -> torch.Tensor:
    """1 - |cos| between v_1 fitted on the first k rows (`early`) and on all T (`late`); (L,).

    cos = u(k)^T G[:k, :T] u(T) / (sigma(k) sigma(T)), since v(k) = M_k^T u(k) / sigma(k).

    Raises:
        ValueError: more rows in `early` than in `late`.
    """
    rows = early.gram_LTT.shape[-1]
    if rows > late.gram_LTT.shape[-1]:
        raise ValueError(f"the early prefix has {rows} rows, the late one only {late.gram_LTT.shape[-1]}")
    cross_LkT = late.gram_LTT[:, :rows, :]
    inner_L = torch.einsum("lk,lkt,lt->l", early.vectors_LTT[..., 0], cross_LkT, late.vectors_LTT[..., 0])
    return 1.0 - (inner_L / (early.values_LT[:, 0] * late.values_LT[:, 0]).sqrt()).abs().clamp_max(1.0)


def split_half_agreement(gram_LTT: torch.Tensor) -> torch.Tensor:
    """|cos| between v_1 of the first half of the rows and v_1 of the second half taken relative to the middle row; (L,).

    With P the rows of the second half minus the middle row, v_a = M_a^T u_a / sigma_a and v_b = (P M)^T u_b / sigma_b.
    NaN below 4 rows.
    """
    rows = gram_LTT.shape[-1]
    if rows < 4:
        return torch.full(gram_LTT.shape[:1], torch.nan, dtype=gram_LTT.dtype)
    half = rows // 2
    shift_kT = torch.eye(rows, dtype=gram_LTT.dtype)[half:]
    shift_kT[:, half - 1] -= 1.0
    first = spectrum(gram_LTT[:, :half, :half])
    second = spectrum(shift_kT @ gram_LTT @ shift_kT.T)
    cross_Lhk = gram_LTT[:, :half, :] @ shift_kT.T
    inner_L = torch.einsum("lh,lhk,lk->l", first.vectors_LTT[..., 0], cross_Lhk, second.vectors_LTT[..., 0])
    return (inner_L / (first.values_LT[:, 0] * second.values_LT[:, 0]).sqrt()).abs().clamp_max(1.0)


def describe(window: Window, rank: int = 1) -> dict[str, torch.Tensor]:
    """The figures that are logged for every observed step, one value a tensor.

    Args:
        window: the rows. Smoothed ones say nothing of how straight the real ones are: only the explained variance is defined
            then.
        rank: directions counted in the explained variance.

    Returns:
        Name -> (L,). `drift` is against the first half of the rows; NaN until there are two halves.
    """
    late = spectrum(window.gram_LTT)
    explained_L = explained_variance(late, rank, window.energy_L)
    if window.smoothed:
        undefined_L = torch.full_like(explained_L, torch.nan)
        return {"explained_variance": explained_L, **dict.fromkeys(("line_r2", "spectral_gap", "drift"), undefined_L)}
    half = window.rows // 2
    drift_L = (
        direction_drift(spectrum(window.gram_LTT[:, :half, :half]), late)
        if half
        else torch.full_like(explained_L, torch.nan)
    )
    return {
        "explained_variance": explained_L,
        "line_r2": line_r2(late, window.steps),
        "spectral_gap": spectral_gap(late),
        "drift": drift_L,
    }


def backtest_prefixes(window: Window, method: str) -> range:
    """Numbers of leading rows from which a method can predict the last row; empty where there are too few, or smoothed."""
    return range(0) if window.smoothed else range(METHODS[method].min_rows, window.rows)


def backtest_error(window: Window, prefix: int, method: str = "relex", rank: int = 1) -> torch.Tensor:
    """Fit on the first `prefix` rows, predict the last observed row, compare with holding row `prefix`; (L,).

    |delta_hat - delta_T| / |delta_prefix - delta_T|, both from G alone: |sum_t x_t delta_t|^2 = x^T G x. Below 1 the
    prediction is nearer to the truth than the checkpoint that it was made from.

    Raises:
        ValueError: prefix is not among `backtest_prefixes`.
    """
    miss_L, hold_L = _backtest(window, prefix, method, rank)
    return (miss_L / hold_L).sqrt()


def backtest_ratio(window: Window, prefix: int, method: str = "relex", rank: int = 1) -> float:
    """`backtest_error` of the whole model: the errors of all tensors added before they are compared; NaN if none moved."""
    miss_L, hold_L = _backtest(window, prefix, method, rank)
    return float((miss_L.sum() / hold_L.sum()).sqrt())


def half_backtest(window: Window, method: str, rank: int = 1) -> float:
    """`backtest_ratio` of predicting the last row from the first half of the rows; NaN where that cannot be done."""
    prefix = (window.rows + 1) // 2
    return backtest_ratio(window, prefix, method, rank) if prefix in backtest_prefixes(window, method) else torch.nan


def summary(values_L: torch.Tensor) -> dict[str, float]:
    """Mean, 10th percentile and minimum over the tensors for which the value is defined; empty when none is."""
    defined = values_L[values_L.isfinite()]
    if not len(defined):
        return {}
    return {
        "mean": defined.mean().item(),
        "p10": defined.quantile(0.1).item(),
        "min": defined.min().item(),
    }


def _trace(gram_LTT: torch.Tensor) -> torch.Tensor:
    return gram_LTT.diagonal(dim1=-2, dim2=-1).sum(-1)


def _quadratic(gram_LTT: torch.Tensor, vectors_LT: torch.Tensor) -> torch.Tensor:
    """x^T G x a tensor, clipped at 0 against rounding; (L,)."""
    return torch.einsum("li,lij,lj->l", vectors_LT, gram_LTT, vectors_LT).clamp_min(0.0)


def _backtest(window: Window, prefix: int, method: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """|delta_hat - delta_T|^2 and |delta_prefix - delta_T|^2, each (L,)."""
    prefixes = backtest_prefixes(window, method)
    if prefix not in prefixes:
        raise ValueError(
            f"prefix must be within {prefixes.start}..{prefixes.stop - 1} for {method}, got {prefix} of {window.rows} rows"
        )
    early = window.until(window.steps[prefix - 1])
    miss_LT = torch.zeros(window.gram_LTT.shape[:2], dtype=torch.float64)
    miss_LT[:, :prefix] = METHODS[method].weights(early, window.steps[-1], rank)
    miss_LT[:, -1] -= 1.0
    hold_LT = torch.zeros_like(miss_LT)
    hold_LT[:, prefix - 1], hold_LT[:, -1] = 1.0, -1.0
    return _quadratic(window.gram_LTT, miss_LT), _quadratic(window.gram_LTT, hold_LT)
