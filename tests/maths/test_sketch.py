"""Sketches against dense least squares: the same polynomials, however the interval grew on the way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import legendre as numpy_legendre
from oracle import trajectories, window_of

from relex_verl.maths.extrapolators import METHODS, Prediction, fit_weights
from relex_verl.maths.sketch import SIZES, interval, legendre, lift, lifted_gram, rebase


def sketched(steps: list[int], deltas: torch.Tensor, size: int) -> torch.Tensor:
    """Moments (r, d) in float64, step by step, the interval doubling as it must."""
    moments, length = torch.zeros(size, deltas.shape[1], dtype=torch.float64), interval(steps[0], steps[0])
    for step, delta in zip(steps, deltas, strict=True):
        if interval(steps[0], step) != length:
            moments = rebase(length, interval(steps[0], step), size) @ moments
            length = interval(steps[0], step)
        moments += legendre([step], steps[0], length, size).T * delta
    return moments


@given(st.integers(1, 10_000), st.integers(0, 10_000))
def test_the_interval_is_the_smallest_power_of_two_that_reaches(first: int, ahead: int) -> None:
    length = interval(first, first + ahead)
    assert length >= max(1, ahead)
    assert length & (length - 1) == 0
    assert length == 1 or length // 2 < ahead


@pytest.mark.parametrize("size", SIZES)
def test_the_basis_is_numpys(size: int) -> None:
    steps = [10, 11, 17, 26]
    x = 2 * (np.array(steps) - 10) / 16 - 1
    np.testing.assert_allclose(legendre(steps, 10, 16, size).numpy(), numpy_legendre.legvander(x, size - 1), atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_a_longer_interval_is_another_basis_of_the_same_polynomials(size: int) -> None:
    steps = [3, 4, 6, 7]
    for longer in (8, 32):
        expected = legendre(steps, 3, longer, size).T
        got = rebase(4, longer, size) @ legendre(steps, 3, 4, size).T
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(trajectories(min_rows=1, max_rows=9), st.sampled_from(SIZES))
def test_rows_come_back_as_their_least_squares_polynomials(dense, size: int) -> None:
    for deltas in dense.deltas:
        moments = sketched(dense.steps, torch.from_numpy(deltas), size)
        got = (lift(dense.steps, size) @ moments).numpy()
        degree = min(size, len(dense.steps)) - 1
        x = np.array(dense.steps, dtype=float)
        x = (x - x.mean()) / max(1.0, np.ptp(x))
        design = numpy_legendre.legvander(x, degree)
        expected = design @ np.linalg.lstsq(design, deltas, rcond=None)[0]
        np.testing.assert_allclose(got, expected, atol=1e-9 * max(np.abs(deltas).max(), 1e-300))


@settings(deadline=None)
@given(trajectories(min_rows=4, max_rows=9), st.sampled_from([name for name, one in METHODS.items() if one.degree]))
def test_with_as_many_moments_as_rows_nothing_is_lost(dense, method: str) -> None:
    """The Gram matrix, and the predictions of every method that fits polynomials."""
    steps, size = dense.steps[:4], 4
    ahead = Prediction(method, steps[-1] + 5)
    for increments in dense.increments:
        deltas = torch.from_numpy(increments).cumsum(0)[:4]
        moments = sketched(steps, deltas, size)
        gram = lifted_gram((moments @ moments.T).unsqueeze(0), steps)
        exact = (deltas @ deltas.T).unsqueeze(0)
        torch.testing.assert_close(gram, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))
        weights_LT = fit_weights(window_of(gram, steps), ahead)
        values = torch.linalg.eigvalsh(exact[0])
        if values[-1] <= 0 or (len(values) > 1 and values[-2] > 0.5 * values[-1]):
            continue  # two directions are as good as one another: either is right
        predicted = (weights_LT @ lift(steps, size))[0] @ moments
        expected = fit_weights(window_of(exact, steps), ahead)[0] @ deltas
        # Of what it is a sum of: a prediction may cancel out.
        torch.testing.assert_close(predicted, expected, rtol=1e-6, atol=1e-6 * float(deltas.abs().max()))


@pytest.mark.parametrize("rows", [60, 400])
def test_four_moments_predict_a_noisy_drift(rows: int) -> None:
    """float32 moments, a drift that bends, a random walk on top: within 1 % of the prediction from all rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    steps = list(range(1, rows + 1))
    share = torch.arange(1, rows + 1, dtype=torch.float64).unsqueeze(1) / rows
    deltas = rows * (share * normal(2000) + 0.3 * share**2 * normal(2000)) + normal(rows, 2000).cumsum(0)
    moments, length = torch.zeros(4, 2000), 1
    for step, delta in zip(steps, deltas, strict=True):
        if interval(1, step) != length:
            moments = rebase(length, interval(1, step), 4).float() @ moments
            length = interval(1, step)
        moments += legendre([step], 1, length, 4).T.float() * delta.float()
    gram = lifted_gram((moments.double() @ moments.double().T).unsqueeze(0), steps)
    for target in (2 * rows, 10 * rows):
        ahead, exact = Prediction("relex", target), window_of((deltas @ deltas.T).unsqueeze(0), steps)
        predicted = (fit_weights(window_of(gram, steps), ahead) @ lift(steps, 4))[0] @ moments.double()
        expected = fit_weights(exact, ahead)[0] @ deltas
        assert (predicted - expected).norm() <= 0.01 * expected.norm()
