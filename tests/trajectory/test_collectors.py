"""What a rank keeps: rows, or a sketch that says what it cannot give."""

from math import prod
from pathlib import Path

import pytest
import torch
from fakes import DriftingModel, RankSource
from pipeline import RUN, STEPS, predicted, train, weights_of

from relex_verl.maths.diagnostics import describe
from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import extrapolate
from relex_verl.trajectory import replay
from relex_verl.trajectory.encodings.quantized import GROUP
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.store import Trajectory


def test_a_sketch_predicts_what_all_rows_predict(base: Path, tmp_path: Path) -> None:
    """And says what it cannot give."""
    exact, sketch = (train(tmp_path / name, base, name) for name in ("fp32-none", "sketch-4"))
    model = DriftingModel(weights_of(base))
    wrong = total = 0.0
    for one, other in zip(predicted(exact), predicted(sketch), strict=True):
        origin = model.base[one.name].flatten()
        wrong += float((one.data.float() - other.data.float()).square().sum())
        total += float((one.data.float() - origin).square().sum())
    assert wrong**0.5 <= 0.01 * total**0.5
    energy, gram = sketch.window().energy_L, exact.window().gram_LTT
    torch.testing.assert_close(energy, gram.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-6, atol=1e-12)
    given, true = (describe(one.window()) for one in (sketch, exact))
    share, exact_share = given["explained_variance"], true["explained_variance"]
    moved = exact_share.isfinite()
    assert torch.equal(share.isfinite(), moved)
    assert bool((share[moved] <= exact_share[moved] + 1e-6).all())
    assert given["line_r2"].isnan().all()
    trajectory = Trajectory(tmp_path / "sketch-4" / "trajectory")
    with pytest.raises(TrajectoryError, match="is a sketch"):
        next(replay.states(trajectory, 5))
    with pytest.raises(TrajectoryError, match="can be cut only where it was stored: at 10"):
        trajectory.steps_until(5)
    with pytest.raises(
        ValueError, match="two-point cannot be predicted from a sketch of size 4: use relex, raw-ols, poly"
    ):
        next(extrapolate(trajectory, 10, Prediction("two-point", 40)))
    assert sum(shard.placement.numel for shard in replay.states(trajectory, 0)) == trajectory.elements


def test_a_sketch_keeps_its_size(base: Path, tmp_path: Path) -> None:
    """In memory and on disk, however many steps; two files, so that a run killed while saving can go back one."""
    model, observer = DriftingModel(weights_of(base)), Observer(tmp_path, str(base), {}, RUN, KINDS["sketch-4"])
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    sizes = []
    for step in range(1, 13):
        observer.observe(step, RankSource(model.at(step)))
        if step % 3 == 0:
            observer.save()
            sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("step_*")))
    elements = sum(prod(shape) for shape in observer.shapes.values())
    assert sorted(path.name for path in tmp_path.rglob("step_*")) == [
        "step_000009.safetensors",
        "step_000012.safetensors",
    ]
    assert sizes[-1] == pytest.approx(sizes[1], rel=0.01)
    assert sizes[-1] / 2 == pytest.approx(16 * elements, rel=0.02)


def test_a_sketch_resumes_from_its_last_file(base: Path, tmp_path: Path) -> None:
    """The steps after the file are lost with the process: a gap in the window, which a least-squares fit can have."""
    model, folder = DriftingModel(weights_of(base)), tmp_path / "trajectory"

    def begin(step: int) -> Observer:
        observer = Observer(folder, str(base), {}, RUN, KINDS["sketch-4"])
        observer.start(RankSource(model.at(0)))
        observer.open(step)
        return observer

    killed = begin(0)
    for step in (1, 2, 3, 5):
        killed.observe(step, RankSource(model.at(step)))
        if step in (2, 3):
            killed.save()
    resumed = begin(3)
    assert resumed.steps == [1, 2, 3]
    for step in (5, 6, 9, 10):
        resumed.observe(step, RankSource(model.at(step)))
    straight = train(tmp_path / "straight", base, "sketch-4")
    torch.testing.assert_close(resumed.window().gram_LTT, straight.window().gram_LTT, rtol=1e-6, atol=1e-12)
    assert begin(2).steps == [1, 2]  # and back to the file before
    assert begin(1).steps == []


def test_a_failed_step_of_a_sketch_ends_it(base: Path, tmp_path: Path) -> None:
    """The moments are half updated: what follows must not look as if nothing had been."""
    model, observer = DriftingModel(weights_of(base)), Observer(tmp_path, str(base), {}, RUN, KINDS["sketch-4"])
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    observer.observe(1, RankSource(model.at(1)))
    observer.save()
    last = list(weights_of(base))[-1]
    with pytest.raises(ValueError, match="not finite"):
        observer.observe(2, RankSource({**model.at(2), last: model.at(2)[last] * torch.nan}))
    with pytest.raises(RuntimeError, match="half-way"):
        observer.observe(2, RankSource(model.at(2)))
    assert Trajectory(tmp_path).steps == [1]


def test_memory_of_the_observer(base: Path, tmp_path: Path) -> None:
    """What follows from the shapes and from nothing else: a state, and for each row codes and scales of whole groups."""
    observer = train(tmp_path, base, "fp32-int8")
    numels = [tensor.numel() for tensor in weights_of(base).values()]
    groups = sum(-(-numel // GROUP) for numel in numels)
    assert [held.state.nbytes for held in observer.held.values()] == [4 * numel for numel in numels]
    rows = [{name: array.nbytes for name, array in row.arrays.items()} for row in observer.collector.packed]
    assert len(rows) == len(STEPS)
    for row in rows:
        assert (row["code"], row["scale"]) == (groups * GROUP, groups * 4)
        figures = 8 * len(numels) * (len(STEPS) + 4)  # a row of H and a few counts for each tensor
        assert sum(row.values()) <= groups * (GROUP + 4) + figures
