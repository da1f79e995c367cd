import pytest
import torch
from recorded import by_name, random_weights, record

from relex_verl.maths.extrapolators import Prediction
from relex_verl.offline.baselines.weight_extrapolation import is_norm, two_point_factor, weight_extrapolation
from relex_verl.pipeline.prediction import extrapolate
from relex_verl.trajectory.index import TrajectoryError

BASE = random_weights(scale=0.1)
STATES = {step: random_weights(seed=step, scale=0.1) for step in (10, 30, 70)}


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    return record(tmp_path_factory.mktemp("run"), BASE, STATES)


@pytest.mark.parametrize(
    ("first", "cut", "last"), [(None, 70, 70), (0, 40, 30), (10, 70, 70), (30, 70, 70), (10, 30, 30)]
)
@pytest.mark.parametrize("copy_norms", [True, False])
def test_is_the_line_through_two_checkpoints(trajectory, first, cut, last, copy_norms):
    found = by_name(weight_extrapolation(trajectory, cut, 200, first, copy_norms))
    start = STATES[first] if first else BASE
    factor = (200 - (first or 0)) / (last - (first or 0))
    for name in BASE:
        expected = start[name] + factor * (STATES[last][name] - start[name])
        if copy_norms and "norm" in name:
            expected = STATES[last][name]
        torch.testing.assert_close(found[name].float(), expected, rtol=2**-8, atol=1e-5)


def test_without_copies_from_the_origin_it_is_the_method_two_point(trajectory):
    here = by_name(weight_extrapolation(trajectory, 70, 200, copy_norms=False))
    there = by_name(extrapolate(trajectory, 70, Prediction("two-point", 200)))
    assert all(torch.equal(here[name], there[name]) for name in BASE)


def test_a_straight_trajectory_is_met_exactly(tmp_path):
    slope = random_weights(seed=9, scale=1e-3)
    straight = {t: {name: one + t * slope[name] for name, one in BASE.items()} for t in (4, 6)}
    found = by_name(weight_extrapolation(record(tmp_path, BASE, straight), 6, 50, first=4, copy_norms=False))
    for name, one in BASE.items():
        torch.testing.assert_close(found[name].float(), one + 50 * slope[name], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "error", "says"),
    [
        (20, TrajectoryError, "step 20 was not observed"),
        (30, ValueError, "later than the first"),
        (70, ValueError, "later"),
    ],
)
def test_a_first_checkpoint_that_does_not_do(trajectory, first, error, says):
    with pytest.raises(error, match=says):
        weight_extrapolation(trajectory, 30, 200, first)


def test_factor():
    assert two_point_factor(0, 1400, 2000) == pytest.approx(2000 / 1400)
    assert two_point_factor(100, 200, 150) == 0.5


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("model.norm.weight", True),
        ("model.layers.0.input_layernorm.weight", True),
        ("model.layers.0.self_attn.q_norm.weight", True),
        ("transformer.h.0.ln_1.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", False),
    ],
)
def test_norm_layers(name, answer):
    assert is_norm(name) is answer
