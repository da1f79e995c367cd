"""A window knows its origin: where rows are counted from, which of them take part, and what follows for every figure."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Dense, increments_of, trajectories, window_of

from relex_verl.maths.diagnostics import backtest_error, describe, random_walk
from relex_verl.maths.extrapolators import METHODS, Prediction, fit_weights
from relex_verl.maths.search import next_target
from relex_verl.maths.window import Window

ORIGIN = 100
STEPS = [110, 120, 130, 140, 150]
LINES = [name for name in METHODS if name not in ("expo", "hold")]


def line_from_origin(steps: list[int], origin_step: int) -> tuple[np.ndarray, Window]:
    """Deltas of a perfect line, 1 in a step, and their window."""
    direction = np.random.default_rng(0).standard_normal(30)
    deltas = np.outer(np.array(steps) - origin_step, direction / np.linalg.norm(direction))
    return deltas, window_of([deltas @ deltas.T], steps, origin_step)


@pytest.mark.parametrize("method", LINES)
def test_a_line_is_continued_from_where_it_began(method: str) -> None:
    """Origin at step 100, target 200: a delta of 100, whatever the method."""
    deltas, window = line_from_origin(STEPS, ORIGIN)
    predicted = fit_weights(window, Prediction(method, 200))[0].numpy() @ deltas
    assert np.linalg.norm(predicted) == pytest.approx(100)


def test_a_random_walk_begins_at_the_origin() -> None:
    """Simulated in 20,000 dimensions from step 100 on: another share than that of a walk from step 0 over the same steps."""
    _, window = line_from_origin(STEPS, ORIGIN)
    walk = np.random.default_rng(0).standard_normal((50, 20_000)).cumsum(0)[9::10]
    simulated = describe(window_of([walk @ walk.T], STEPS, ORIGIN))
    null = describe(random_walk(window))
    assert null["explained_variance"].item() == pytest.approx(0.823, abs=0.001)
    for name, value in simulated.items():
        assert value.item() == pytest.approx(null[name].item(), abs=0.02), name


@settings(deadline=None, max_examples=25)
@given(trajectories(min_rows=5, kinds=("walk", "line")), st.integers(1, 300), st.data())
def test_nothing_but_the_distance_from_the_origin_counts(dense: Dense, shift: int, data: st.DataObject) -> None:
    """A run that begins at step `shift` is the same run with other numbers on its steps."""
    moved = window_of(dense.gram, [step + shift for step in dense.steps], shift)
    target, prefix = dense.steps[-1] + data.draw(st.integers(1, 50)), len(dense.steps) - 1
    for method in METHODS:
        here = fit_weights(dense.window, Prediction(method, target))
        there = fit_weights(moved, Prediction(method, target + shift))
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)
        errors = backtest_error(dense.window, prefix, method), backtest_error(moved, prefix, method)
        torch.testing.assert_close(*errors, rtol=1e-5, atol=1e-6, equal_nan=True)
    following = next_target({target: 0.6}, [], dense.steps[-1], 0.5)
    shifted = next_target({target + shift: 0.6}, [], dense.steps[-1] + shift, 0.5, origin_step=shift)
    assert (None if following is None else following + shift) == shifted


def test_until_and_since_keep_the_origin_and_the_rows_between() -> None:
    window = window_of(Dense(STEPS, [increments_of("walk", np.random.default_rng(1), 5, 20)]).gram, STEPS, ORIGIN)
    middle = window.until(145).since(115)
    assert list(middle.steps) == [120, 130, 140]
    assert middle.origin_step == ORIGIN
    assert middle.distances == [20, 30, 40]
    assert torch.equal(middle.gram_LTT, window.gram_LTT[:, 1:4, 1:4])
    assert window.until(STEPS[-1]) is window
    assert window.since(STEPS[0]) is window
    with pytest.raises(ValueError, match="no row is left from step 151 on: the observed steps are 110 to 150"):
        window.since(151)
    with pytest.raises(ValueError, match="no row is left up to step 109"):
        window.until(109)


def test_a_sketch_keeps_its_rows_together_and_its_own_energy() -> None:
    gram_LTT = torch.tensor(Dense(STEPS, [increments_of("walk", np.random.default_rng(1), 5, 20)]).gram)
    energy_L = 2 * gram_LTT.diagonal(dim1=1, dim2=2).sum(1)
    window = Window(["a"], STEPS, gram_LTT, ORIGIN, energy_L)
    assert window.smoothed
    assert not window_of(gram_LTT, STEPS).smoothed
    share = describe(window)["explained_variance"]
    torch.testing.assert_close(2 * share, describe(window_of(gram_LTT, STEPS))["explained_variance"])
    for change in (lambda: window.since(115), lambda: window.until(115)):
        with pytest.raises(ValueError, match="a sketch cannot leave out steps that it holds, 110 to 150"):
            change()


def test_some_of_the_tensors() -> None:
    dense = Dense(STEPS, [increments_of("walk", np.random.default_rng(seed), 5, 20) for seed in range(3)])
    chosen = dense.window.select([2, 0])
    assert list(chosen.names) == ["tensor 2", "tensor 0"]
    assert torch.equal(chosen.gram_LTT, dense.window.gram_LTT[[2, 0]])


@pytest.mark.parametrize(
    ("steps", "origin_step", "says"),
    [([3, 2], 0, "must ascend"), ([0, 1], 0, "must ascend from the origin at 0"), ([5, 6], 7, "from the origin at 7")],
)
def test_steps_that_do_not_ascend_from_the_origin_are_refused(steps: list[int], origin_step: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        window_of(torch.zeros(1, 2, 2, dtype=torch.float64), steps, origin_step)


def test_a_gram_matrix_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"G has shape \(1, 2, 2\), \(1, 3, 3\) tensors and steps are named"):
        Window(["a"], [1, 2, 3], torch.zeros(1, 2, 2, dtype=torch.float64))
