import pytest
import torch
from recorded import by_name, random_weights, record

from relex_verl.maths.extrapolators import Prediction, fit_weights
from relex_verl.pipeline.prediction import extrapolate, weighted_tensors
from relex_verl.trajectory import replay

BASE = random_weights(scale=0.1)
STATES = {step: random_weights(seed=step, scale=0.1) for step in (1, 2, 5)}


def weighted(trajectory, cut, weights_LT):
    window = replay.window(trajectory, cut)
    return weighted_tensors(replay.histories(trajectory, cut), trajectory.kind, window, weights_LT)


def test_is_the_weighted_sum_of_the_deltas(tmp_path):
    trajectory = record(tmp_path, BASE, STATES)
    weights = torch.randn(len(BASE), 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = by_name(weighted(trajectory, 4, weights))
    assert set(found) == set(trajectory.names)
    for name, row in zip(trajectory.names, weights, strict=True):
        deltas = [STATES[step][name].double() - BASE[name].double() for step in (1, 2)]
        expected = BASE[name].double() + sum(a * delta for a, delta in zip(row, deltas, strict=True))
        torch.testing.assert_close(found[name].double(), expected, rtol=2**-8, atol=1e-6)


def test_has_the_same_bits_as_the_pipeline(tmp_path):
    trajectory = record(tmp_path, BASE, STATES)
    prediction = Prediction("relex", 20)
    here = by_name(weighted(trajectory, 5, fit_weights(replay.window(trajectory, 5), prediction)))
    there = by_name(extrapolate(trajectory, 5, prediction))
    assert all(torch.equal(here[name], there[name]) for name in BASE)


def test_refuses_weights_of_another_shape(tmp_path):
    trajectory = record(tmp_path, BASE, STATES)
    with pytest.raises(ValueError, match=r"shape \(6, 3\), got \(6, 2\)"):
        next(weighted(trajectory, 5, torch.zeros(6, 2)))
