from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import window_of
from recorded import by_name, moved, random_weights, rank_one_directions, record

from relex_verl.offline.baselines.coefficient_transformer import (
    TransformerSettings,
    fit_coefficients,
    transformer_tensors,
    transformer_weights,
)
from relex_verl.trajectory.index import TrajectoryError

SETTINGS = TransformerSettings(width=16, epochs=60, learning_rate=3e-3)
SLOPES = torch.tensor([[1.0], [-2.0], [1e-6], [0.0]], dtype=torch.float64)


def test_recovers_lines_whatever_their_slope_and_wherever_their_rows_lie():
    for steps in ([1, 2, 3, 4, 5, 6, 7, 8], [5, 10, 20, 25, 40]):
        lines = SLOPES * torch.tensor(steps, dtype=torch.float64)
        fit = fit_coefficients(lines, steps, 100, settings=SETTINGS)
        torch.testing.assert_close(fit.coefficients_L, (SLOPES * 100).squeeze(1), rtol=0.05, atol=0.0)
        assert fit.last_loss < 1e-2 * fit.first_loss


def test_learns_a_slowing_coefficient_that_a_line_overshoots():
    steps = list(range(1, 25))
    curve = 1.0 - 0.97 ** torch.arange(1, 41, dtype=torch.float64)
    curves = torch.tensor([[1.0], [-3.0]], dtype=torch.float64) * curve
    fit = fit_coefficients(curves[:, :24], steps, 30, settings=replace(SETTINGS, epochs=150))
    line = np.polyval(np.polyfit(steps, curves[0, :24].numpy(), 1), 30)
    truth = curves[0, 29].item()
    assert abs(fit.coefficients_L[0].item() - truth) < 0.5 * abs(line - truth)


def test_the_last_stride_is_cut_to_the_target():
    lines = SLOPES[:2] * torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    near, far = (fit_coefficients(lines, [10, 20, 30, 40], t, settings=SETTINGS).coefficients_L for t in (41, 45))
    torch.testing.assert_close(near, 41 * SLOPES[:2, 0], rtol=0.02, atol=0.0)
    torch.testing.assert_close((far - lines[:, -1]) / (near - lines[:, -1]), torch.full((2,), 5.0).double())


def test_another_origin():
    lines = SLOPES[:2] * torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    shifted = fit_coefficients(lines, [110, 120, 130], 150, origin=100, settings=SETTINGS)
    assert torch.equal(
        shifted.coefficients_L, fit_coefficients(lines, [10, 20, 30], 50, settings=SETTINGS).coefficients_L
    )


def test_the_sign_of_a_singular_vector_does_not_matter():
    curves = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
    steps, brief = [1, 2, 3, 4, 5, 6], replace(SETTINGS, epochs=5)
    one, two = (fit_coefficients(sign * curves, steps, 9, settings=brief).coefficients_L for sign in (1, -1))
    torch.testing.assert_close(one, -two)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_state_alone():
    curves = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
    state = torch.random.get_rng_state()
    one, two, other = (
        fit_coefficients(curves, [1, 2, 3, 4, 5, 6], 9, settings=replace(SETTINGS, epochs=5, seed=seed)).coefficients_L
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_network_sees_no_row_before_its_time():
    from relex_verl.offline.baselines.coefficient_transformer import _NextSpeed

    network = _NextSpeed(SETTINGS).eval()
    speeds = torch.randn(2, 7)
    changed = speeds.clone()
    changed[:, 5:] += 1
    with torch.no_grad():
        torch.testing.assert_close(network(speeds)[:, :5], network(changed)[:, :5])
        assert not torch.allclose(network(speeds)[:, 5:], network(changed)[:, 5:])


def test_weights_give_c_hat_along_v1():
    rng = np.random.default_rng(0)
    deltas = rng.standard_normal((2, 5, 9)).cumsum(axis=1)
    deltas[1] = 0
    gram = torch.from_numpy(deltas @ deltas.transpose(0, 2, 1))
    steps, brief = [1, 2, 3, 4, 5], replace(SETTINGS, epochs=5)
    weights = transformer_weights(window_of(gram, steps), 8, brief)
    left, values, right = np.linalg.svd(deltas[0], full_matrices=False)
    coefficients = torch.from_numpy(left[:, 0] * values[0]).unsqueeze(0)
    expected = fit_coefficients(coefficients, steps, 8, settings=brief).coefficients_L.item() * right[0]
    np.testing.assert_allclose(weights[0].numpy() @ deltas[0], expected, rtol=1e-4, atol=1e-5)
    assert not weights[1].any()


def test_predicts_a_straight_trajectory_from_disk(tmp_path):
    base, directions = random_weights(scale=0.1), rank_one_directions()
    trajectory = record(tmp_path, base, {step: moved(base, directions, 1e-2 * step) for step in (5, 10, 15, 20, 30)})
    found = by_name(transformer_tensors(trajectory, 20, 100, SETTINGS))
    for name, direction in directions.items():
        change = found[name].float() - base[name]
        assert torch.linalg.norm(change - direction) < 0.05


def test_refusals(tmp_path):
    lines = SLOPES * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="3 observed steps"):
        fit_coefficients(lines[:, :2], [1, 2], 9)
    with pytest.raises(ValueError, match="after the last observed step"):
        fit_coefficients(lines, [1, 2, 3], 3)
    with pytest.raises(ValueError, match="no tensor has moved"):
        fit_coefficients(0 * lines, [1, 2, 3], 9)
    base = random_weights()
    with pytest.raises(TrajectoryError, match="3 observed steps up to 5"):
        transformer_tensors(record(tmp_path, base, dict.fromkeys((4, 5, 6), base)), 5, 9)
