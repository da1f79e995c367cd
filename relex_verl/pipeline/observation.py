"""What one observed step gave."""

from dataclasses import dataclass

import torch

__all__ = ["Observation"]


@dataclass(frozen=True)
class Observation:
    """One observed step, summed over the ranks.

    Attributes:
        step: the training step.
        changed_share: share of the weights whose change since the row before was not 0 (as it is kept); NaN for a
            sketch, which does not keep the row before.
        stored_bytes: bytes that the trajectory holds of the window's steps (those of a sketch are written by `save`).
        changed_share_L, stored_bytes_L: the same of each tensor, (L,).
    """

    step: int
    changed_share: float
    stored_bytes: int
    changed_share_L: torch.Tensor
    stored_bytes_L: torch.Tensor
