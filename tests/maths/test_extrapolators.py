import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import PREDICTIONS, Dense, fitted, increments_of, tolerance, trajectories, window_of

from relex_verl.maths.extrapolators import (
    METHODS,
    Prediction,
    fit_weights,
    increment_coefficients,
    line_hat,
    polynomial_hat,
    reconstruction_weights,
    top_eigenvectors,
)

WINDOW_STEPS = [3, 4, 9, 20, 26, 40]


def weights_of(name, dense, target, rank=1):
    return METHODS[name].weights(dense.window, target, rank)


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_prediction_equals_the_dense_one(name, data):
    dense = data.draw(trajectories(min_rows=METHODS[name].min_rows))
    rank = data.draw(st.integers(1, 4))
    target = dense.steps[-1] + data.draw(st.integers(1, 60))
    weights_LT = weights_of(name, dense, target, rank)
    assert weights_LT.dtype == torch.float64
    assert weights_LT.shape == (len(dense.increments), len(dense.steps))
    coefficients_LT = increment_coefficients(weights_LT).numpy()
    for a, from_last, increments, deltas in zip(
        weights_LT.numpy(), coefficients_LT, dense.increments, dense.deltas, strict=True
    ):
        theta_0 = np.linspace(-1, 1, deltas.shape[1]) * np.abs(deltas).max()
        expected = theta_0 + PREDICTIONS[name](deltas, dense.steps, target, rank)
        atol = tolerance(deltas, dense.steps, target, rank, degree=3 if name == "poly" else 1)
        np.testing.assert_allclose(theta_0 + a @ deltas, expected, rtol=0, atol=atol)
        theta_last = theta_0 + deltas[-1]
        np.testing.assert_allclose(theta_last + from_last @ increments, expected, rtol=0, atol=2 * atol)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_prediction_equals_the_dense_one_to_many_digits_where_it_is_well_conditioned(name, rank):
    rng = np.random.default_rng(3)
    # Three directions of clearly different size: no near tie, so nothing but rounding may differ.
    times = np.array(WINDOW_STEPS)[:, None] / 40
    deltas = np.concatenate([8 * times, 2 * times**2, np.sin(5 * times)], 1) @ rng.standard_normal((3, 300))
    increments = np.diff(deltas, axis=0, prepend=0)
    a = weights_of(name, Dense(WINDOW_STEPS, [increments]), 100, rank).numpy()[0]
    expected = PREDICTIONS[name](deltas, WINDOW_STEPS, 100, rank)
    assert np.linalg.norm(a @ deltas - expected) < 1e-10 * np.linalg.norm(expected)


def test_every_method_has_an_oracle_and_says_where_it_comes_from():
    assert set(PREDICTIONS) == set(METHODS)
    for method in METHODS.values():
        assert method.formula
        assert method.source


@pytest.mark.parametrize("name", ["relex", "anchored", "anchored-half", "two-point", "first-step", "raw-ols", "poly"])
def test_a_straight_line_is_continued_exactly_along_real_steps(name):
    direction = np.random.default_rng(0).standard_normal(50)
    deltas = np.outer(WINDOW_STEPS, direction)
    dense = Dense(WINDOW_STEPS, [np.diff(deltas, axis=0, prepend=0)])
    prediction = weights_of(name, dense, 200).numpy()[0] @ deltas
    np.testing.assert_allclose(prediction, 200 * direction, rtol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_a_tensor_that_never_moved_stays_at_its_base_and_disturbs_no_other(name):
    rng = np.random.default_rng(1)
    moving = increments_of("walk", rng, 6, 30)
    alone = weights_of(name, Dense(WINDOW_STEPS, [moving]), 100)
    beside = weights_of(name, Dense(WINDOW_STEPS, [np.zeros((6, 7)), moving]), 100)
    assert beside.isfinite().all()
    torch.testing.assert_close(beside[1:], alone, rtol=1e-12, atol=1e-12)
    if name in ("relex", "poly"):
        assert not beside[0].any()


@pytest.mark.parametrize("name", METHODS)
def test_min_rows_is_enough(name):
    rows = METHODS[name].min_rows
    dense = Dense(WINDOW_STEPS[:rows], [increments_of("walk", np.random.default_rng(2), rows, 30)])
    assert weights_of(name, dense, 100).isfinite().all()


@pytest.mark.parametrize("name", ["relex", "anchored", "raw-ols", "poly"])
def test_one_row_fewer_is_refused(name):
    rows = METHODS[name].min_rows - 1
    dense = Dense(WINDOW_STEPS[:rows], [increments_of("walk", np.random.default_rng(2), rows, 30)])
    with pytest.raises(ValueError, match="observed steps"):
        weights_of(name, dense, 100)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 500), min_size=4, max_size=40, unique=True).map(sorted),
    st.integers(1, 1000),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_the_hat_vector_evaluates_the_fitted_polynomial(steps, target, degree, seed):
    values = np.random.default_rng(seed).standard_normal(len(steps))
    hat = polynomial_hat(steps, target, degree).numpy()
    growth = (1 + abs(2 * target - steps[0] - steps[-1]) / (steps[-1] - steps[0])) ** degree
    conditioning = np.linalg.cond(np.vander(np.interp(steps, (steps[0], steps[-1]), (-1, 1)), degree + 1))
    assert hat @ values == pytest.approx(
        fitted(steps, values, target, degree), rel=0, abs=1e-13 * growth * conditioning
    )


def test_the_line_hat_is_the_formula_of_its_docstring():
    steps, target = np.array(WINDOW_STEPS, dtype=float), 77
    centred = steps - steps.mean()
    expected = 1 / len(steps) + (target - steps.mean()) * centred / (centred**2).sum()
    np.testing.assert_allclose(line_hat(WINDOW_STEPS, target).numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("steps", "degree"), [([5], 1), ([5, 5, 5], 1), ([1, 2, 3], 3), ([1, 1, 2, 3], 3), ([], 1)])
def test_too_few_different_steps_for_the_polynomial(steps, degree):
    with pytest.raises(ValueError, match=f"needs {degree + 1} observed steps"):
        polynomial_hat(steps, 10, degree)


@settings(deadline=None, max_examples=40)
@given(trajectories(), st.integers(1, 4), st.data())
def test_reconstruction_is_the_truncated_svd(dense, rank, data):
    row = data.draw(st.integers(0, len(dense.steps) - 1))
    weights_LT = reconstruction_weights(dense.window, dense.steps[row], rank).numpy()
    for a, deltas in zip(weights_LT, dense.deltas, strict=True):
        u, s, vt = np.linalg.svd(deltas, full_matrices=False)
        expected = (u[row, :rank] * s[:rank]) @ vt[:rank]
        atol = tolerance(deltas, dense.steps, 0, rank)
        np.testing.assert_allclose(a @ deltas, expected, rtol=0, atol=atol)


def test_reconstruction_at_full_rank_gives_the_row_back():
    deltas = increments_of("walk", np.random.default_rng(4), 6, 30).cumsum(0)
    weights = reconstruction_weights(window_of([deltas @ deltas.T], WINDOW_STEPS), WINDOW_STEPS[2], rank=6)
    np.testing.assert_allclose(weights[0].numpy(), np.eye(6)[2], atol=1e-12)


def test_increment_coefficients_are_suffix_sums_less_one():
    got = increment_coefficients(torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 1.0]], dtype=torch.float64))
    assert got.tolist() == [[6.0, 5.0, 3.0], [0.0, 0.0, 0.0]]


def test_top_eigenvectors_are_ordered_clipped_and_cut_to_the_rows():
    gram_LTT = torch.diag_embed(torch.tensor([[1.0, 9.0, -1e-18]], dtype=torch.float64))
    vectors_LTr, values_Lr = top_eigenvectors(gram_LTT, rank=7)
    assert vectors_LTr.shape == (1, 3, 3)
    assert values_Lr.tolist() == [[9.0, 1.0, 0.0]]
    assert vectors_LTr[0, :, 0].abs().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be at least 1"):
        top_eigenvectors(torch.eye(2, dtype=torch.float64).unsqueeze(0), rank)


@pytest.mark.parametrize("name", METHODS)
def test_rows_before_fit_from_take_no_part(name):
    dense = Dense([2, 5, 7, 12, 20, 26, 31], [increments_of("walk", np.random.default_rng(5), 7, 60)] * 2)
    weights_LT = fit_weights(dense.window, Prediction(name, 80, rank=2, fit_from=6))
    deltas = dense.deltas[0]
    expected = PREDICTIONS[name](deltas[2:], dense.steps[2:], 80, 2)
    assert not weights_LT[:, :2].any()
    for a in weights_LT.numpy():
        np.testing.assert_allclose(a @ deltas, expected, rtol=0, atol=1e-7 * np.linalg.norm(expected))


def test_fit_from_a_row_includes_it_and_without_it_all_rows_count():
    window = Dense(WINDOW_STEPS, [increments_of("walk", np.random.default_rng(6), 6, 60)]).window
    assert fit_weights(window, Prediction("raw-ols", 100, fit_from=9))[0].ne(0).tolist() == [False] * 2 + [True] * 4
    assert torch.equal(fit_weights(window, Prediction("relex", 100)), METHODS["relex"].weights(window, 100, 1))


@pytest.mark.parametrize("name", METHODS)
def test_fit_from_must_leave_enough_rows(name):
    window = Dense(WINDOW_STEPS, [increments_of("walk", np.random.default_rng(6), 6, 60)]).window
    with pytest.raises(ValueError, match=f"{name} needs {METHODS[name].min_rows} observed steps"):
        fit_weights(window, Prediction(name, 100, fit_from=WINDOW_STEPS[-METHODS[name].min_rows] + 1))


def test_from_step_0_and_from_step_1_on_are_all_rows():
    window = Dense([1, 2, 3, 5, 8, 13], [increments_of("walk", np.random.default_rng(6), 6, 60)]).window
    whole = fit_weights(window, Prediction("relex", 100))
    assert all(torch.equal(fit_weights(window, Prediction("relex", 100, fit_from=first)), whole) for first in (0, 1))
    assert Prediction("relex", 100).fit_from == 1
