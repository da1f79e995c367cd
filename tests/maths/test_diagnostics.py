import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import PREDICTIONS, Dense, increments_of, trajectories, window_of

from relex_verl.maths.diagnostics import (
    backtest_error,
    backtest_ratio,
    coefficients,
    describe,
    direction_drift,
    explained_variance,
    line_r2,
    random_walk,
    spectral_gap,
    spectrum,
    split_half_agreement,
    summary,
)
from relex_verl.maths.extrapolators import METHODS

MOVING = ("walk", "line")
ZERO = torch.zeros(1, 6, 6, dtype=torch.float64)
STEPS = [2, 3, 7, 8, 15, 30]


def walk_over(steps, origin_step=0):
    """A random walk over these steps."""
    nothing = torch.zeros(1, len(steps), len(steps), dtype=torch.float64)
    return random_walk(window_of(nothing, steps, origin_step))


def well_separated(deltas, ratio=0.9):
    """Whether the first direction is determined: sigma_2 clearly below sigma_1."""
    sigma = np.append(np.linalg.svd(deltas, compute_uv=False), 0.0)
    return sigma[1] < ratio * sigma[0]


def first_direction(deltas):
    return np.linalg.svd(deltas, full_matrices=False)[2][0]


@settings(deadline=None, max_examples=50)
@given(trajectories(min_rows=3, kinds=MOVING), st.integers(1, 4))
def test_spectral_figures_equal_the_dense_ones(dense, rank):
    of = spectrum(torch.tensor(dense.gram))
    for i, deltas in enumerate(dense.deltas):
        sigma = np.append(np.linalg.svd(deltas, compute_uv=False), 0.0)
        share = (sigma[:rank] ** 2).sum() / (deltas**2).sum()
        assert explained_variance(of, rank)[i].item() == pytest.approx(share, abs=1e-12)
        assert spectral_gap(of)[i].item() == pytest.approx((sigma[0] - sigma[1]) / sigma[0], abs=1e-6)
        assert not (of.values_LT < 0).any()


@settings(deadline=None, max_examples=50)
@given(trajectories(min_rows=3, kinds=MOVING))
def test_coefficients_and_their_line_equal_the_dense_ones(dense):
    assume(all(well_separated(deltas) for deltas in dense.deltas))
    of = spectrum(torch.tensor(dense.gram))
    for got, r2, deltas in zip(coefficients(of).numpy(), line_r2(of, dense.steps), dense.deltas, strict=True):
        c = deltas @ first_direction(deltas)
        c = c if c[-1] >= 0 else -c
        np.testing.assert_allclose(got, c, rtol=0, atol=1e-9 * np.linalg.norm(c))
        assume(np.ptp(c) > 1e-3 * np.abs(c).max())
        assert r2.item() == pytest.approx(np.corrcoef(dense.steps, c)[0, 1] ** 2, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(trajectories(min_rows=2, kinds=MOVING), st.data())
def test_drift_is_the_angle_between_dense_directions(dense, data):
    k = data.draw(st.integers(1, len(dense.steps)))
    gram_LTT = torch.tensor(dense.gram)
    drift_L = direction_drift(spectrum(gram_LTT[:, :k, :k]), spectrum(gram_LTT))
    for got, deltas in zip(drift_L, dense.deltas, strict=True):
        assume(well_separated(deltas) and well_separated(deltas[:k]))
        cosine = first_direction(deltas[:k]) @ first_direction(deltas)
        assert got.item() == pytest.approx(1 - abs(cosine), abs=1e-9)
        assert 0 <= got.item() <= 1


def test_drift_refuses_an_early_prefix_that_is_the_longer_one():
    with pytest.raises(ValueError, match="6 rows, the late one only 5"):
        direction_drift(spectrum(walk_over(STEPS).gram_LTT), spectrum(walk_over(STEPS[:5]).gram_LTT))


@settings(deadline=None, max_examples=50)
@given(trajectories(min_rows=4, kinds=MOVING))
def test_agreement_is_the_cosine_between_the_dense_directions_of_two_halves(dense):
    half = len(dense.steps) // 2
    for got, deltas in zip(split_half_agreement(torch.tensor(dense.gram)), dense.deltas, strict=True):
        halves = deltas[:half], deltas[half:] - deltas[half - 1]
        assume(all(well_separated(part) for part in halves))
        cosine = first_direction(halves[0]) @ first_direction(halves[1])
        assert got.item() == pytest.approx(abs(cosine), abs=1e-8)


def test_agreement_is_one_on_a_line_none_on_a_walk_and_undefined_without_two_halves():
    line = np.outer(STEPS, np.random.default_rng(0).standard_normal(20))
    stopped = np.minimum(np.arange(6), 2)[:, None] * line[:1]
    straight = torch.tensor(np.stack([line @ line.T, stopped @ stopped.T]))
    agreement_L = split_half_agreement(torch.cat([straight, walk_over(STEPS).gram_LTT, ZERO]))
    assert agreement_L[0].item() == pytest.approx(1.0)
    assert agreement_L[1].isnan()
    assert agreement_L[2].item() == pytest.approx(0.0, abs=1e-9)
    assert agreement_L[3].isnan()
    assert split_half_agreement(walk_over(STEPS[:3]).gram_LTT).isnan().all()


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_backtest_is_the_dense_error_over_the_error_of_holding(method, data):
    least = METHODS[method].min_rows
    dense = data.draw(trajectories(min_rows=least + 1, kinds=MOVING))
    prefix = data.draw(st.integers(least, len(dense.steps) - 1))
    fitted_on = [deltas[:prefix] for deltas in dense.deltas]
    half = prefix // 2
    assume(all(well_separated(deltas) for deltas in fitted_on))
    if method == "anchored-half":
        assume(all(well_separated(deltas[half:] - deltas[half - 1]) for deltas in fitted_on))
    got_L = backtest_error(dense.window, prefix, method)
    for got, deltas in zip(got_L, dense.deltas, strict=True):
        hold = np.linalg.norm(deltas[prefix - 1] - deltas[-1])
        assume(hold > 1e-2 * np.linalg.norm(deltas))
        prediction = PREDICTIONS[method](deltas[:prefix], dense.steps[:prefix], dense.steps[-1], 1)
        error = np.linalg.norm(prediction - deltas[-1]) / hold
        scale = (np.linalg.norm(deltas) + np.linalg.norm(prediction)) / hold
        assert got.item() == pytest.approx(error, abs=1e-6 * scale)


def test_backtest_uses_the_rank_and_holding_scores_one():
    window = Dense(STEPS, [increments_of("walk", np.random.default_rng(0), 6, 40)]).window
    assert backtest_error(window, 4, "hold").tolist() == pytest.approx([1.0])
    raw = backtest_error(window, 4, "raw-ols").item()
    assert backtest_error(window, 4, "relex", rank=4).item() == pytest.approx(raw)
    assert backtest_error(window, 4, "relex", rank=1).item() != pytest.approx(raw, rel=1e-3)


def test_the_ratio_is_the_error_of_all_tensors_as_one():
    rng = np.random.default_rng(1)
    increments = [increments_of("line", rng, 6, 30), 5 * increments_of("walk", rng, 6, 40), np.zeros((6, 4))]
    deltas = np.cumsum(np.concatenate(increments, axis=1), axis=0)
    parts = np.split(deltas, [30, 70], axis=1)
    predicted = np.concatenate([PREDICTIONS["relex"](part[:4], STEPS[:4], STEPS[-1], 2) for part in parts])
    expected = np.linalg.norm(predicted - deltas[-1]) / np.linalg.norm(deltas[3] - deltas[-1])
    window = Dense(STEPS, increments).window
    assert backtest_ratio(window, 4, "relex", rank=2) == pytest.approx(expected)
    assert np.isnan(backtest_ratio(window_of(ZERO, STEPS), 4))


@pytest.mark.parametrize(("method", "prefix"), [("relex", 1), ("relex", 6), ("hold", 0), ("poly", 3), ("relex", 7)])
def test_backtest_refuses_a_prefix_that_cannot_work(method, prefix):
    with pytest.raises(ValueError, match="prefix must be within"):
        backtest_error(walk_over(STEPS), prefix, method)


def test_a_random_walk_shows_0_81_and_0_96():
    """Simulated in 20,000 dimensions, and the limit that is printed beside every figure; also unevenly observed."""
    steps = list(range(1, 76))
    walk = np.random.default_rng(0).standard_normal((75, 20_000)).cumsum(0)
    simulated = describe(window_of([walk @ walk.T], steps))
    null = describe(walk_over(steps))
    for figures in (simulated, null):
        assert figures["explained_variance"].item() == pytest.approx(0.81, abs=0.01)
        assert figures["line_r2"].item() == pytest.approx(0.96, abs=0.01)
    for name, value in simulated.items():
        assert value.item() == pytest.approx(null[name].item(), abs=0.01), name

    rows = [3, 5, 6, 20, 21, 40, 75]
    seen = walk[np.array(rows) - 1]
    uneven = describe(window_of([seen @ seen.T], rows))
    for name, value in describe(walk_over(rows)).items():
        assert uneven[name].item() == pytest.approx(value.item(), abs=0.02), name


def test_a_straight_line_scores_full_marks():
    deltas = np.outer(STEPS, np.random.default_rng(0).standard_normal(20))
    figures = describe(window_of([deltas @ deltas.T], STEPS))
    assert {name: round(value.item(), 6) for name, value in figures.items()} == {
        "explained_variance": 1.0,
        "line_r2": 1.0,
        "spectral_gap": 1.0,
        "drift": 0.0,
    }


def test_describe_drifts_against_the_first_half_of_the_rows():
    window = Dense(STEPS, [increments_of("walk", np.random.default_rng(0), 6, 40)]).window
    gram_LTT = window.gram_LTT
    expected = direction_drift(spectrum(gram_LTT[:, :3, :3]), spectrum(gram_LTT))
    torch.testing.assert_close(describe(window)["drift"], expected)
    torch.testing.assert_close(
        describe(window, rank=2)["explained_variance"], explained_variance(spectrum(gram_LTT), 2)
    )


def test_a_tensor_that_never_moved_has_no_figures_and_spoils_no_others():
    stacked = window_of(torch.cat([ZERO, walk_over(STEPS).gram_LTT]), STEPS)
    alone = describe(walk_over(STEPS))
    for name, value_L in describe(stacked).items():
        assert value_L[0].isnan(), name
        assert value_L[1].item() == pytest.approx(alone[name].item()), name
        assert summary(value_L)["min"] == pytest.approx(alone[name].item())
    assert backtest_error(stacked, 4)[0].isnan()


def test_moved_only_in_the_second_half_has_no_drift_yet():
    deltas = np.zeros((6, 10))
    deltas[3:] = np.random.default_rng(0).standard_normal((3, 10))
    figures = describe(window_of([deltas @ deltas.T], STEPS))
    assert figures["drift"].isnan().all()
    assert figures["explained_variance"].isfinite().all()


def test_moved_at_the_first_row_only_has_no_line():
    jumps = np.random.default_rng(0).standard_normal((40, 12))
    gram_LTT = torch.tensor(np.stack([np.full((6, 6), jump @ jump) for jump in jumps]))
    assert line_r2(spectrum(gram_LTT), STEPS).isnan().all()


@pytest.mark.parametrize("rows", [1, 2])
def test_figures_that_few_rows_do_not_define_are_not_numbers(rows):
    figures = describe(walk_over(STEPS[:rows]))
    assert figures["line_r2"].isnan().all()
    assert figures["explained_variance"].isfinite().all()
    assert figures["spectral_gap"].isnan().all() == (rows == 1)
    assert figures["drift"].isnan().all() == (rows == 1)


def test_summary_counts_defined_values_only():
    values_L = torch.tensor([float("nan"), float("inf")] + [float(i) for i in range(11)], dtype=torch.float64)
    assert summary(values_L) == pytest.approx({"mean": 5.0, "p10": 1.0, "min": 0.0})
    assert summary(values_L[:2]) == {}
