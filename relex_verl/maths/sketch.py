"""A sketch of a trajectory: its least-squares polynomials over the steps, in memory that does not grow with T.

Instead of the T deltas a sketch keeps r moments of each weight,

    S = Q^T M    (r x n),    Q_tj = P_j(x_t),    x_t = 2 (s_t - s_1) / B - 1    in [-1, 1],

with P_j the Legendre polynomial of degree j. Each new row adds P_j(x_t) delta_t to moment j and is then forgotten. How
long the run will be need not be known: when a step leaves the interval [s_1, s_1 + B], B doubles, and as the polynomials
of degree below r are the same on every interval, the moments only change their basis (`rebase`, an r x r matrix).

Any polynomial of degree below r through the rows, fitted by least squares, can be read off: M_hat = P P^T M with P an
orthonormal basis of Q's columns, M_hat = (Q^+)^T S. RELEX's line is such a polynomial, and so, nearly, are the rows'
coefficients along v_1; what a sketch loses is the rows themselves.
"""

from collections.abc import Sequence

import torch

__all__ = ["SIZES", "interval", "legendre", "lift", "lifted_gram", "rebase"]

# Moments are float32 and the basis is only nearly orthogonal over the steps seen: with 7 and more, digits would be lost.
SIZES = range(2, 7)


def interval(first: int, last: int) -> int:
    """B: the smallest power of two with first + B >= last.

    Args:
        first: s_1.
        last: the latest step.
    """
    return 1 << max(0, last - first - 1).bit_length()


def legendre(steps: Sequence[float], first: int, length: int, size: int) -> torch.Tensor:
    """Q: the Legendre polynomials P_0 .. P_{r-1} on [first, first + length] at these steps.

    By the recurrence (j + 1) P_{j+1} = (2 j + 1) x P_j - j P_{j-1}.

    Args:
        steps: T of them.
        first: s_1, the lower end.
        length: B.
        size: r.

    Returns:
        (T, r) float64.
    """
    x_T = 2 * (torch.tensor(list(steps), dtype=torch.float64) - first) / length - 1
    columns = [torch.ones_like(x_T), x_T]
    for j in range(1, size - 1):
        columns.append(((2 * j + 1) * x_T * columns[j] - j * columns[j - 1]) / (j + 1))
    return torch.stack(columns[:size], dim=1)


def rebase(length: int, longer: int, size: int) -> torch.Tensor:
    """A with P_j on [0, longer] = sum_k A_jk P_k on [0, length]: the moments S over the longer interval are A S.

    Args:
        length: B before.
        longer: B after.
        size: r.

    Returns:
        (r, r) float64.
    """
    nodes = [length * i / (size - 1) for i in range(size)]  # r points determine a polynomial of degree below r
    short, long = legendre(nodes, 0, length, size), legendre(nodes, 0, longer, size)
    return torch.linalg.solve(short, long).T


def lift(steps: Sequence[int], size: int) -> torch.Tensor:
    """(Q^+)^T, which turns moments into rows: M_hat = lift S. Exact (M_hat = M) for up to r rows.

    A prediction sum_t a_t delta_t is then (lift^T a) S.

    Args:
        steps: the T real steps that are in the moments, ascending.
        size: r.

    Returns:
        (T, r) float64.
    """
    basis_Tr = legendre(steps, steps[0], interval(steps[0], steps[-1]), size)
    return torch.linalg.pinv(basis_Tr, rtol=1e-9).T


def lifted_gram(moment_gram_Lrr: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    """Gram matrix of M_hat: what a sketch knows of G, the rows smoothed to polynomials.

    Args:
        moment_gram_Lrr: S S^T, (L, r, r) float64.
        steps: the T real steps that are in the moments, ascending.

    Returns:
        (L, T, T), of rank r at most.
    """
    lift_Tr = lift(steps, moment_gram_Lrr.shape[-1])
    return lift_Tr @ moment_gram_Lrr @ lift_Tr.T
