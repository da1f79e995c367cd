"""Sums of many float64 numbers in an order that is written down, so that every way to compute one gives the same bits.

A library's sum adds in the order that its vectors are wide. Here 64 numbers are added in a tree of halves (1st and 33rd, 2nd
and 34th, ..., then the 32 sums likewise), and longer rows in 64 lanes: number i goes to lane i mod 64, one after another,
and the lanes are added in a tree. The compiled kernels do the same in their loops.
"""

import torch

__all__ = ["LANES", "in_lanes", "tree"]

LANES = 64


def tree(values: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension, of 64: (..., 64) -> (...)."""
    while values.shape[-1] > 1:
        first, second = values.chunk(2, dim=-1)
        values = first + second
    return values.squeeze(-1)


def in_lanes(values: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension, of any length: (..., n) -> (...)."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % LANES))
    lanes = values.new_zeros(*values.shape[:-1], LANES)
    for row in padded.split(LANES, dim=-1):
        lanes = lanes + row
    return tree(lanes)
