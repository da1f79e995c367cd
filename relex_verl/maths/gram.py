"""From rows of increments to the Gram matrix of the deltas, for stacks of tensors.

Notation, for one weight tensor observed at real training steps s_1 < ... < s_T:

    delta_t = theta_t - theta_0        (paper, section 2.2: row t of the trajectory matrix M)
    e_t     = theta_t - theta_{t-1}    (increment)
    H       = E E^T                    (T x T, Gram matrix of the increments)
    G       = M M^T = L H L^T          (T x T, Gram matrix of the deltas; L = lower-triangular ones)

A stack of L tensors is an array (L, T, T). Everything is float64: G is a difference of nearly equal numbers where the
trajectory is nearly straight. Paper: https://arxiv.org/abs/2605.21468
"""

from collections.abc import Sequence

import torch

__all__ = ["delta_gram", "increment_gram"]


def increment_gram(rows: Sequence[torch.Tensor], layers: int) -> torch.Tensor:
    """H from the rows of its lower triangle: a run only appends to them, and nothing is copied as H grows.

    Args:
        rows: of each step <e_t, e_1>, ..., <e_t, e_t>, (L, t) float64; T of them, maybe 0.
        layers: L.

    Returns:
        H, (L, T, T).

    Raises:
        ValueError: the shapes do not fit.
    """
    gram_LTT = torch.empty(layers, len(rows), len(rows), dtype=torch.float64)
    for t, row_Lt in enumerate(rows):
        if row_Lt.shape != (layers, t + 1):
            raise ValueError(f"row of shape {tuple(row_Lt.shape)} does not border H of shape {(layers, t, t)}")
        gram_LTT[:, t, : t + 1] = row_Lt
        gram_LTT[:, : t + 1, t] = row_Lt
    return gram_LTT


def delta_gram(increment_gram_LTT: torch.Tensor) -> torch.Tensor:
    """G = L H L^T: cumulative sums of H along both axes.

    Args:
        increment_gram_LTT: H, (L, T, T).

    Returns:
        G, (L, T, T): the Gram matrix of the deltas (paper, appendix A, "SVD computation").
    """
    return increment_gram_LTT.cumsum(dim=-1).cumsum(dim=-2)
