from dataclasses import replace

import pytest
import recorded
import torch
from recorded import MATRICES, by_name, moved, random_weights, rank_one_directions, record, record_cut_up

from relex_verl.offline.baselines.next_extrapolation import NextSettings, fit_next, next_tensors
from relex_verl.trajectory.index import TrajectoryError

# A network's middle layer is as wide as its vectors are long: it needs some length to tell several matrices apart.
SHAPES = {name: tuple(4 * size for size in shape) for name, shape in recorded.SHAPES.items()}
BASE = random_weights(SHAPES, scale=0.1)
DIRECTIONS = rank_one_directions(SHAPES)
STRAIGHT = {step: moved(BASE, DIRECTIONS, 1e-3 * step) for step in range(2, 31, 2)}
SETTINGS = NextSettings(interval=2, look_ahead=10, width=32, epochs=100, learning_rate=3e-3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return record(tmp_path_factory.mktemp("straight"), BASE, STRAIGHT)


@pytest.fixture(scope="module")
def fit(straight):
    return fit_next(straight, 30, SETTINGS)


def error(found, name, expected_amount):
    expected = expected_amount * DIRECTIONS[name]
    return (torch.linalg.norm(found[name] - BASE[name] - expected) / torch.linalg.norm(expected)).item()


def test_training_reduces_the_loss(fit):
    assert fit.last_loss < 0.05 * fit.first_loss
    assert fit.last == 30


def test_recovers_a_straight_rank_one_trajectory(straight, fit):
    found = by_name(next_tensors(straight, fit))
    assert set(found) == set(BASE)
    assert max(error(found, name, 1e-3 * 40) for name in MATRICES) < 0.05
    for name in set(BASE) - set(MATRICES):
        torch.testing.assert_close(found[name], STRAIGHT[30][name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 4.0])
def test_the_coefficient_multiplies_the_predicted_change(straight, fit, coefficient):
    found = by_name(next_tensors(straight, fit, coefficient))
    for name in MATRICES:
        one = fit.changes[name]
        change = coefficient * one.value * torch.outer(one.left, one.right)
        torch.testing.assert_close(found[name], STRAIGHT[30][name] + change, rtol=1e-5, atol=1e-6)
        assert torch.linalg.vector_norm(one.left).item() == pytest.approx(1.0, abs=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(straight):
    brief = replace(SETTINGS, epochs=3)
    state = torch.random.get_rng_state()
    one, two, other = (fit_next(straight, 30, replace(brief, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one.changes[name].left, two.changes[name].left) for name in MATRICES)
    assert not torch.equal(one.changes[MATRICES[0]].left, other.changes[MATRICES[0]].left)
    assert torch.equal(state, torch.random.get_rng_state())


def test_how_the_ranks_cut_the_tensors_and_the_size_of_the_updates_do_not_matter(tmp_path, straight):
    brief = replace(SETTINGS, epochs=20)
    whole = fit_next(straight, 30, brief)
    cut_up = fit_next(record_cut_up(tmp_path / "cut", BASE, STRAIGHT), 30, brief)
    larger = {step: moved(BASE, DIRECTIONS, step) for step in STRAIGHT}
    scaled = fit_next(record(tmp_path / "larger", BASE, larger), 30, brief)
    for name in MATRICES:
        assert cut_up.changes[name].value == pytest.approx(whole.changes[name].value, rel=1e-3)
        assert scaled.changes[name].value == pytest.approx(1e3 * whole.changes[name].value, rel=1e-2)


def test_the_authors_settings_run_and_learn(tmp_path):
    states = {step: moved(BASE, DIRECTIONS, 1e-3 * step) for step in range(10, 151, 10)}
    fit = fit_next(record(tmp_path, BASE, states), 150, NextSettings(epochs=50))
    assert fit.last_loss < fit.first_loss


def test_matrices_that_never_moved_stay(tmp_path):
    states = {step: {**weights, MATRICES[0]: BASE[MATRICES[0]]} for step, weights in STRAIGHT.items()}
    trajectory = record(tmp_path, BASE, states)
    fit = fit_next(trajectory, 30, replace(SETTINGS, epochs=2))
    assert torch.equal(by_name(next_tensors(trajectory, fit, 4.0))[MATRICES[0]], BASE[MATRICES[0]])


def test_no_step_after_the_cut_is_seen(straight):
    brief = replace(SETTINGS, epochs=2)
    fit = fit_next(straight, 20, brief)
    assert fit.last == 20
    torch.testing.assert_close(by_name(next_tensors(straight, fit, 0.0))[MATRICES[0]], STRAIGHT[20][MATRICES[0]])


@pytest.mark.parametrize(
    ("cut", "settings", "says"),
    [
        (30, NextSettings(interval=3, look_ahead=10), "needs step 27 besides"),
        (30, NextSettings(interval=2, look_ahead=50), "no checkpoint to learn from"),
        (30, NextSettings(interval=2, look_ahead=5), "no checkpoint to learn from"),
        (10, NextSettings(interval=2, look_ahead=10), "no checkpoint to learn from"),
    ],
)
def test_intervals_that_the_observed_steps_do_not_allow(straight, cut, settings, says):
    with pytest.raises(TrajectoryError, match=says):
        fit_next(straight, cut, settings)


def test_a_model_without_such_matrices(tmp_path):
    base = {"weight": torch.ones(3, 3)}
    states = {t: {"weight": torch.ones(3, 3) + t} for t in (1, 2, 3)}
    with pytest.raises(ValueError, match="no tensor's name"):
        fit_next(record(tmp_path, base, states), 3, NextSettings(1, 1))
