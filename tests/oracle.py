"""The slow way: dense delta matrices, NumPy's SVD and polynomial fits in float64, written from the definitions alone.

Nothing here uses relex_verl but the class that holds G. A trajectory is a list of tensors; of each, M (T, d) holds
delta_t = theta_t - theta_0.
"""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.polynomial import Polynomial

from relex_verl.maths.window import Window


class Dense(NamedTuple):
    """L tensors observed at the same steps."""

    steps: list
    increments: list  # of (T, d_l) arrays

    @property
    def deltas(self):
        """M of every tensor."""
        return [np.cumsum(one, axis=0) for one in self.increments]

    @property
    def gram(self):
        """G of every tensor, (L, T, T)."""
        return np.stack([delta @ delta.T for delta in self.deltas])

    @property
    def window(self):
        """What methods and diagnostics take."""
        return window_of(self.gram, self.steps)


def window_of(gram, steps, origin_step=0):
    """A window with any names."""
    gram_LTT = torch.as_tensor(gram)
    return Window([f"tensor {i}" for i in range(len(gram_LTT))], list(steps), gram_LTT, origin_step)


KINDS = ("walk", "line", "low-rank", "once", "late", "zero")


def increments_of(kind, rng, rows, dim):
    """Increments (T, d) of one kind of trajectory."""
    walk = rng.standard_normal((rows, dim))
    if kind == "walk":
        return walk
    if kind == "line":
        return rng.standard_normal(dim) + 0.05 * walk
    if kind == "low-rank":  # two directions, however many rows
        return rng.standard_normal((rows, 2)) @ rng.standard_normal((2, dim))
    moved = np.zeros((rows, dim))
    if kind == "once":
        moved[rng.integers(rows)] = rng.standard_normal(dim)
    if kind == "late":
        moved[rows // 2 :] = walk[rows // 2 :]
    return moved


@st.composite
def trajectories(draw, min_rows=1, max_rows=9, kinds=KINDS):
    """Stacks of tensors of different sizes and scales, observed at unevenly spaced steps."""
    rows = draw(st.integers(min_rows, max_rows))
    steps = np.cumsum(draw(st.lists(st.integers(1, 12), min_size=rows, max_size=rows))).tolist()
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tensors = draw(
        st.lists(st.tuples(st.sampled_from(kinds), st.integers(1, 40), st.integers(-6, 2)), min_size=1, max_size=4)
    )
    return Dense(steps, [increments_of(kind, rng, rows, dim) * 10.0**scale for kind, dim, scale in tensors])


def fitted(steps, values, target, degree):
    """The least-squares polynomial through (steps, values), evaluated at the target."""
    return Polynomial.fit(steps, values, degree)(target)


def along_directions(deltas, rank, change):
    """sum_{i <= rank} change(c_i) v_i with c_i = M v_i, v_i the right singular vectors."""
    directions = np.linalg.svd(deltas, full_matrices=False)[2][:rank]
    return sum((change(deltas @ direction) * direction for direction in directions), np.zeros(deltas.shape[1]))


def relex(deltas, steps, target, rank):
    return along_directions(deltas, rank, lambda c: np.polyval(np.polyfit(steps, c, 1), target))


def anchored(deltas, steps, target, rank):
    """theta_T plus what the rank-r lines add between s_T and the target."""
    return deltas[-1] + along_directions(deltas, rank, lambda c: np.polyfit(steps, c, 1)[0] * (target - steps[-1]))


def anchored_half(deltas, steps, target, rank):
    """As `anchored`, but directions and lines are of the later rows, seen from the middle one as if it were theta_0."""
    middle = len(steps) // 2 - 1
    later, late = deltas[middle + 1 :] - deltas[middle], steps[middle + 1 :]
    return deltas[-1] + along_directions(later, rank, lambda c: np.polyfit(late, c, 1)[0] * (target - steps[-1]))


def poly(deltas, steps, target, rank):
    return along_directions(deltas, rank, lambda c: fitted(steps, c, target, 3))


def raw_ols(deltas, steps, target, rank):
    """A line through every single weight."""
    slope, intercept = np.polyfit(steps, deltas, 1)
    return slope * target + intercept


def two_point(deltas, steps, target, rank):
    """W_0 + a (W_T - W_0), a = (target - 0) / (s_T - 0)."""
    return target / steps[-1] * deltas[-1]


def first_step(deltas, steps, target, rank):
    """W_0 + k (W_1 - W_0): as many first steps as fit into the target."""
    return target / steps[0] * deltas[0]


def expo(deltas, steps, target, rank):
    """W_T + 0.5 (W_T - W_0)."""
    return deltas[-1] + 0.5 * deltas[-1]


def hold(deltas, steps, target, rank):
    return deltas[-1]


PREDICTIONS = {
    "relex": relex,
    "anchored": anchored,
    "anchored-half": anchored_half,
    "two-point": two_point,
    "first-step": first_step,
    "raw-ols": raw_ols,
    "expo": expo,
    "poly": poly,
    "hold": hold,
}


def tolerance(deltas, steps, target, rank, degree=1):
    """How far two correct float64 computations of a prediction may lie apart, given the conditioning of this example.

    The polynomial enlarges errors by its growth beyond the window; a Gram matrix resolves singular values down to
    sqrt(eps) sigma_1; and where sigma_r and sigma_{r+1} nearly tie, the r-th direction itself is not determined.
    """
    half = len(steps) // 2 if len(steps) > 3 else 0  # the shortest window that any method fits over
    growth = (1 + target / max(1, steps[-1] - steps[half])) ** degree
    norm = np.linalg.norm(deltas)
    loosest = 0.0
    for part in (deltas, deltas[half:] - deltas[max(half - 1, 0)]):
        sigma = np.append(np.linalg.svd(part, compute_uv=False), 0.0)
        if rank < len(sigma):
            gap = sigma[rank - 1] ** 2 - sigma[rank] ** 2
            angle = min(1.0, 1e-13 * norm**2 / gap) if gap > 0 else 1.0
            loosest = max(loosest, 2 * angle * sigma[rank - 1])
    return growth * (1e-6 * norm + loosest)
