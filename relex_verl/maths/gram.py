"""From rows of increments to the Gram matrix of the deltas, for stacks of tensors.

Notation, for one weight tensor observed at real training steps s_1 < ... < s_T:

    delta_t = theta_t - theta_0        (paper, section 2.2: row t of the trajectory matrix M)
    e_t     = theta_t - theta_{t-1}    (increment)
    H       = E E^T                    (T x T, Gram matrix of the increments)
    G       = M M^T = L H L^T          (T x T, Gram matrix of the deltas; L = lower-triangular ones)

A stack of L tensors is an array (L, T, T). Everything is float64: G is a difference of nearly equal numbers where the
trajectory is nearly straight. Paper: https://arxiv.org/abs/2605.21468
"""

import torch

__all__ = ["append_row", "delta_gram"]


def append_row(increment_gram_LTT: torch.Tensor, row_LT1: torch.Tensor) -> torch.Tensor:
    """Border H with the dot products of a new increment.

    Args:
        increment_gram_LTT: H of the increments so far, (L, T, T) float64; T may be 0.
        row_LT1: <e_{T+1}, e_1>, ..., <e_{T+1}, e_{T+1}>, (L, T+1) float64.

    Returns:
        H of all T+1 increments, (L, T+1, T+1).

    Raises:
        ValueError: the shapes do not fit.
    """
    layers, rows = increment_gram_LTT.shape[:2]
    if row_LT1.shape != (layers, rows + 1):
        raise ValueError(
            f"row of shape {tuple(row_LT1.shape)} does not border H of shape {tuple(increment_gram_LTT.shape)}"
        )
    bordered = increment_gram_LTT.new_zeros(layers, rows + 1, rows + 1)
    bordered[:, :rows, :rows] = increment_gram_LTT
    bordered[:, rows, :] = row_LT1
    bordered[:, :, rows] = row_LT1
    return bordered


def delta_gram(increment_gram_LTT: torch.Tensor) -> torch.Tensor:
    """G = L H L^T: cumulative sums of H along both axes.

    Args:
        increment_gram_LTT: H, (L, T, T).

    Returns:
        G, (L, T, T): the Gram matrix of the deltas (paper, appendix A, "SVD computation").
    """
    return increment_gram_LTT.cumsum(dim=-1).cumsum(dim=-2)
