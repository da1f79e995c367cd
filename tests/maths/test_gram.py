import numpy as np
import pytest
import torch
from hypothesis import given, settings
from oracle import trajectories

from relex_verl.maths.gram import delta_gram, increment_gram


def row_by_row(increments):
    """H of a stack, from the rows that a run appends."""
    rows = [torch.tensor(np.stack([one[: t + 1] @ one[t] for one in increments])) for t in range(len(increments[0]))]
    return increment_gram(rows, len(increments))


@settings(deadline=None, max_examples=60)
@given(trajectories())
def test_rows_of_increments_become_the_gram_matrix_of_the_deltas(dense):
    increment_gram_LTT = row_by_row(dense.increments)
    for got, one in zip(increment_gram_LTT.numpy(), dense.increments, strict=True):
        np.testing.assert_allclose(got, one @ one.T, rtol=1e-12, atol=1e-13 * np.square(one).sum())
    for got, expected in zip(delta_gram(increment_gram_LTT).numpy(), dense.gram, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.trace(expected))


def test_a_long_nearly_straight_trajectory_keeps_its_digits():
    rng = np.random.default_rng(0)
    increments = rng.standard_normal(5000) + 1e-4 * rng.standard_normal((75, 5000))
    deltas = increments.cumsum(0)
    gram = delta_gram(row_by_row([increments])).numpy()[0]
    assert np.abs(gram / (deltas @ deltas.T) - 1).max() < 1e-13


def test_no_rows_yet():
    assert delta_gram(increment_gram([], 3)).shape == (3, 0, 0)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (1, 3), (3, 3), (3,)])
def test_a_row_that_does_not_fit_is_refused(shape):
    rows = [torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)]
    with pytest.raises(ValueError, match="does not border"):
        increment_gram([*rows, torch.zeros(shape, dtype=torch.float64)], 2)
