"""Rows of a window, alignment with the truth, and folders of predictions, against dense float64 computations."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import moved, random_weights, rank_one_directions, record, record_cut_up

from relex_verl.maths.extrapolators import Prediction
from relex_verl.offline import analysis
from relex_verl.pipeline.prediction import extrapolate
from relex_verl.reporting.provenance import Provenance
from relex_verl.trajectory import replay
from relex_verl.trajectory.index import TrajectoryError

STEPS = (2, 4, 6, 10, 14)


@pytest.fixture(scope="module")
def states():
    base, directions = random_weights(scale=0.05), rank_one_directions()
    noise = {step: random_weights(seed=step, scale=2e-3) for step in STEPS}
    return {
        step: {name: tensor + noise[step][name] for name, tensor in moved(base, directions, 0.1 * step).items()}
        for step in STEPS
    } | {0: base}


@pytest.fixture(scope="module")
def trajectory(states, tmp_path_factory):
    return record(tmp_path_factory.mktemp("run"), states[0], {step: states[step] for step in STEPS})


def delta(states, step, name):
    return (states[step][name].double() - states[0][name].double()).flatten()


# ---------------------------------------------------------------- windows

observed_steps = st.lists(st.integers(1, 200), min_size=1, max_size=12, unique=True).map(sorted)


def rows_at(steps, origin=0):
    def until(cut):
        return [step for step in steps if step <= cut]

    return SimpleNamespace(steps=steps, steps_until=until, record=SimpleNamespace(origin_step=origin))


@given(observed_steps, st.integers(1, 500))
def test_a_cut_may_lie_between_rows_and_not_where_more_were_to_be_expected(steps, cut):
    """A regularly observed run never has a cut refused before its next row is missing, and always after."""
    rows = rows_at(steps)
    gaps = [late - early for early, late in pairwise(steps)] or [steps[0]]
    if cut < steps[-1] + max(gaps):
        assert analysis.observed_until(rows, cut) == [step for step in steps if step <= cut]
    else:
        with pytest.raises(TrajectoryError, match=f"--t-cut {cut}: the last observed step is {steps[-1]}"):
            analysis.observed_until(rows, cut)


@pytest.mark.parametrize(("cut", "seen"), [(75, 70), (70, 70), (79, 70), (85, 80), (89, 80)])
def test_rows_every_ten_steps(cut, seen):
    steps = list(range(10, 81, 10))
    rows = rows_at(steps)
    assert analysis.observed_until(rows, cut)[-1] == seen


def test_one_row_is_as_far_from_the_next_as_from_its_origin():
    assert analysis.observed_until(rows_at([45], 40), 49) == [45]
    with pytest.raises(TrajectoryError, match="--t-cut 50: the last observed step is 45"):
        analysis.observed_until(rows_at([45], 40), 50)


def test_a_window_without_its_first_rows(trajectory):
    window = analysis.window(trajectory, 12, fit_from=3)
    assert list(window.steps) == [4, 6, 10]
    assert torch.equal(window.gram_LTT, replay.window(trajectory).gram_LTT[:, 1:4, 1:4])
    assert not window.smoothed
    with pytest.raises(TrajectoryError, match="--fit-from 11"):
        analysis.window(trajectory, 12, fit_from=11)


def test_spread_leaves_out_what_is_not_defined():
    assert analysis.spread(1.0, [float("nan"), float("inf")]) is None
    found = analysis.spread(1.0, [1.0, float("nan"), 2.0, 6.0], "mean")
    assert (found.x, found.middle) == (1.0, 3.0)


# ---------------------------------------------------------------- alignment


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_reconstruction_is_aligned_as_dense_projections_are(trajectory, states, rank):
    found = analysis.align_reconstruction(replay.window(trajectory), rank)
    assert [one.step for one in found] == list(STEPS)
    for i, name in enumerate(trajectory.names):
        rows = torch.stack([delta(states, step, name) for step in STEPS])
        right = torch.linalg.svd(rows, full_matrices=False).Vh[:rank]
        for one, row in zip(found, rows, strict=True):
            hat = right.T @ (right @ row)
            assert one.cosine[i] == pytest.approx(float(hat @ row / hat.norm() / row.norm()), rel=1e-5)
            assert one.ratio[i] == pytest.approx(float(hat.norm() / row.norm()), rel=1e-5)


@pytest.mark.parametrize("fit_from", [0, 4])
def test_later_rows_are_a_truth_like_any_other(trajectory, states, fit_from):
    found = analysis.align_observed(trajectory, 8, ["relex", "hold"], [10, 14], fit_from=fit_from)
    assert [(one.method, one.step) for one in found] == [("relex", 10), ("hold", 10), ("relex", 14), ("hold", 14)]
    for one in found:
        inner = hat_square = true_square = 0.0
        predicted = {s.name: s.data for s in extrapolate(trajectory, 8, Prediction(one.method, one.step, 1, fit_from))}
        for i, name in enumerate(trajectory.names):
            true = delta(states, one.step, name)
            hat = predicted[name].double() - states[0][name].double().flatten()
            assert one.cosine[i] == pytest.approx(float(hat @ true / hat.norm() / true.norm()), rel=5e-3)
            assert one.ratio[i] == pytest.approx(float(hat.norm() / true.norm()), rel=5e-3)
            inner, hat_square = inner + float(hat @ true), hat_square + float(hat @ hat)
            true_square += float(true @ true)
        assert one.model_cosine == pytest.approx(inner / (hat_square * true_square) ** 0.5, rel=5e-3)
        assert one.model_ratio == pytest.approx((hat_square / true_square) ** 0.5, rel=5e-3)


# ---------------------------------------------------------------- Algorithm 1 and predictions on disk


def test_reconstruct_is_the_projection(trajectory, states):
    for shard in analysis.reconstruct(trajectory, 10, 1):
        rows = torch.stack([delta(states, step, shard.name) for step in STEPS])
        right = torch.linalg.svd(rows, full_matrices=False).Vh[0]
        expected = states[0][shard.name].double().flatten() + right * (right @ rows[3])
        assert torch.allclose(shard.data.double(), expected, rtol=2**-8)
    with pytest.raises(TrajectoryError, match="--step 5 is not among the 5 observed steps 2 to 14"):
        analysis.reconstruct(trajectory, 5, 1)


def test_nothing_is_made_for_what_cannot_be_fitted(trajectory, tmp_path):
    prediction = Prediction("relex", 20)
    provenance = Provenance.of(prediction, "base", 2, [2], trajectory.folder)
    shards = extrapolate(trajectory, 2, prediction)  # one row
    with pytest.raises(ValueError, match="needs 2 observed steps"):
        analysis.write_prediction(trajectory, shards, tmp_path / "new/relex-step_20", provenance)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_goes_on_and_does_not_mix_with_another(states, tmp_path):
    trajectory = record_cut_up(tmp_path / "run", states[0], {step: states[step] for step in STEPS})
    gram = replay.window(trajectory).gram_LTT
    assert gram.shape[1] == len(STEPS)
    progressed = []
    arguments = ([6, 10], [10, 20], ["relex", "hold"], tmp_path / "grid")
    rows = analysis.sweep(trajectory, *arguments, progress=lambda title, elements: progressed.append(elements))
    assert [(row["method"], row["t_cut"], row["target"]) for row in rows] == [
        ("relex", 6, 10), ("relex", 6, 20), ("hold", 6, 10), ("hold", 6, 20), ("relex", 10, 20), ("hold", 10, 20),
    ]  # fmt: skip
    assert sum(progressed) == 6 * trajectory.elements
    progressed.clear()
    assert analysis.sweep(trajectory, *arguments, progress=lambda title, elements: progressed.append(elements)) == rows
    assert progressed == 6 * [trajectory.elements]
    manifest = json.loads((tmp_path / "grid/manifest.json").read_text())
    assert manifest["predictions"] == rows
    with pytest.raises(ValueError, match=r"holds another prediction \(rank 1 there, 2 here\)"):
        analysis.sweep(trajectory, *arguments, rank=2)


def test_a_sweep_that_0_1_0_began_goes_on(states, tmp_path):
    """Its relex.json knows no schema_version, and a call from Python wrote fit_from 0 for all rows."""
    trajectory = record_cut_up(tmp_path / "run", states[0], {step: states[step] for step in STEPS})
    folder, arguments = tmp_path / "grid/cut_6/relex-step_10", ([6], [10, 20], ["relex"], tmp_path / "grid")
    analysis.sweep(trajectory, *arguments)
    facts = json.loads((folder / "relex.json").read_text())
    old = {key: value for key, value in facts.items() if key != "schema_version"} | {"fit_from": 0}
    (folder / "relex.json").write_text(json.dumps(old))
    before = (folder / "model.safetensors").stat().st_ino
    analysis.sweep(trajectory, *arguments)
    assert json.loads((folder / "relex.json").read_text()) == old
    assert (folder / "model.safetensors").stat().st_ino == before


@pytest.mark.parametrize(
    ("content", "says"),
    [('{"step": 3}', "lacks base_model"), ("{", "is damaged"), ('{"schema_version": 9}', "version 9")],
)
def test_a_folder_that_says_something_else_is_left_alone(trajectory, tmp_path, content, says):
    folder = tmp_path / "cut_6/relex-step_20"
    folder.mkdir(parents=True)
    (folder / "relex.json").write_text(content)
    with pytest.raises(ValueError, match=f"holds something else than this prediction .*{says}.*give another --out"):
        analysis.sweep(trajectory, [6], [20], ["relex"], tmp_path)
    assert [path.name for path in folder.iterdir()] == ["relex.json"]
