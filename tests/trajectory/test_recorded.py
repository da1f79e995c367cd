"""Rows that go on to disk alone: the same bits as those that are kept, in memory that does not grow."""

from pathlib import Path

import pytest
import torch
from fakes import DriftingModel, RankSource
from pipeline import PREDICTION, RUN, STEPS, on_two_ranks, train, weights_of

from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import extrapolate
from relex_verl.trajectory import replay
from relex_verl.trajectory.collectors import RowRecorder
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.store import Trajectory


def begin(folder: Path, base: Path, kind: str, step: int, recording: bool, rank: int = 0, world: int = 1) -> Observer:
    """An observer as `RelexRank` opens one, after a step that training goes on from."""
    observer = Observer(folder, str(base), {}, RUN, KINDS[kind])
    observer.start(RankSource(DriftingModel(weights_of(base)).at(0), rank, world))
    if recording:
        record(observer)
    observer.open(step)
    return observer


def record(observer: Observer) -> None:
    observer.collector = RowRecorder(observer.kind, observer.held, observer.steps)


def observe(observer: Observer, base: Path, steps: list[int], rank: int = 0, world: int = 1) -> None:
    model = DriftingModel(weights_of(base))
    for step in steps:
        observer.observe(step, RankSource(model.at(step), rank, world))


def recorded_rank(rank: int, world: int, folder: Path, base: Path) -> None:
    """Cut at step 3, recorded from there on; killed after 9, and resumed from 6."""
    observer = begin(folder, base, "bf16", 0, False, rank, world)
    observe(observer, base, [1, 2, 3], rank, world)
    record(observer)
    observe(observer, base, [5, 6, 9], rank, world)
    resumed = begin(folder, base, "bf16", 6, True, rank, world)
    assert resumed.steps == [1, 2, 3, 5, 6]
    observe(resumed, base, [9, 10], rank, world)


def check_same(recorded: Trajectory, kept: Trajectory) -> None:
    """All that is computed from the rows that were recorded is what is computed from those that were kept."""
    assert recorded.steps == kept.steps == STEPS
    assert recorded.index.schema_version == kept.index.schema_version == 2
    for cut in (None, 6):
        assert torch.equal(replay.window(recorded, cut).gram_LTT, replay.window(kept, cut).gram_LTT)
    for step in (0, 1, 6, 9, 10):
        for one, other in zip(replay.states(recorded, step), replay.states(kept, step), strict=True):
            assert torch.equal(one.data, other.data)
    for one, other in zip(*(extrapolate(of, 10, PREDICTION) for of in (recorded, kept)), strict=True):
        assert torch.equal(one.data, other.data)


@pytest.mark.parametrize(("kind", "cut"), [("bf16", 0), ("fp32-int8", 3), ("fp32-none", 0)])
def test_what_is_recorded_is_what_is_kept(base: Path, tmp_path: Path, kind: str, cut: int) -> None:
    """From the start (no cut at all), and after one."""
    train(tmp_path / "kept", base, kind)
    observer = begin(tmp_path / "recorded", base, kind, 0, recording=not cut)
    observe(observer, base, [step for step in STEPS if step <= cut])
    record(observer)
    observe(observer, base, [step for step in STEPS if step > cut])
    recorded, kept = Trajectory(tmp_path / "recorded"), Trajectory(tmp_path / "kept" / "trajectory")
    check_same(recorded, kept)
    columns = [recorded.load(0, step).arrays["gram_row"].shape[1] for step in STEPS]
    assert columns == [i + 1 if step <= cut else 0 for i, step in enumerate(STEPS)]


def test_ranks_and_kills_do_not_matter(base: Path, tmp_path: Path) -> None:
    train(tmp_path / "kept", base, "bf16")
    on_two_ranks(recorded_rank, tmp_path / "recorded", base)
    recorded, kept = Trajectory(tmp_path / "recorded"), Trajectory(tmp_path / "kept" / "trajectory")
    assert recorded.steps == STEPS
    for cut in (3, None):
        torch.testing.assert_close(replay.window(recorded, cut).gram_LTT, replay.window(kept, cut).gram_LTT)
    model = DriftingModel(weights_of(base))
    for step in (3, 6, 9, 10):
        weights, whole = model.at(step), {}
        for shard in replay.states(recorded, step):
            flat = whole.setdefault(shard.name, torch.full((weights[shard.name].numel(),), torch.nan))
            for begin_here, start, length in shard.placement.runs():
                flat[start : start + length] = shard.data[begin_here : begin_here + length].float()
        for name, flat in whole.items():
            assert torch.equal(flat, weights[name].flatten().bfloat16().float()), (step, name)


def test_killed_before_the_last_cut(base: Path, tmp_path: Path) -> None:
    """The rows behind verl's checkpoint are dropped, those up to it are kept in memory again, for the cut to come."""
    train(tmp_path / "kept", base, "fp32-int8")
    observer = begin(tmp_path / "recorded", base, "fp32-int8", 0, recording=False)
    observe(observer, base, [1, 2, 3])
    record(observer)
    observe(observer, base, [5, 6])
    resumed = begin(tmp_path / "recorded", base, "fp32-int8", 2, recording=False)
    observe(resumed, base, [3])
    assert torch.equal(resumed.window().gram_LTT, replay.window(Trajectory(tmp_path / "recorded")).gram_LTT)
    record(resumed)
    observe(resumed, base, [5, 6, 9, 10])
    check_same(Trajectory(tmp_path / "recorded"), Trajectory(tmp_path / "kept" / "trajectory"))


def test_a_run_that_is_to_be_cut_again_gets_the_products_it_lacks(base: Path, tmp_path: Path) -> None:
    """Recorded without a cut, and gone on with by a configuration that has one."""
    straight = train(tmp_path / "kept", base, "fp32-int8")
    observe(begin(tmp_path / "recorded", base, "fp32-int8", 0, recording=True), base, [1, 2, 3, 5])
    resumed = begin(tmp_path / "recorded", base, "fp32-int8", 5, recording=False)
    observe(resumed, base, [6, 9, 10])
    assert torch.equal(resumed.window().gram_LTT, straight.window().gram_LTT)


@pytest.mark.parametrize("kind", ["bf16", "fp32-int8"])
def test_memory_does_not_grow(base: Path, tmp_path: Path, kind: str) -> None:
    """State alone: what was kept up to the cut is let go of, and no row to come is held on to."""
    observer = begin(tmp_path, base, kind, 0, recording=False)
    observe(observer, base, [1, 2, 3])
    record(observer)
    observe(observer, base, [5])
    held = {name: value for name, value in vars(observer.collector).items() if name not in ("kind", "codec")}
    assert held.pop("steps") == [1, 2, 3, 5]
    assert set(held) == {"held", "_taken", "_bytes_l"}
    assert held["_taken"] is None
    size = 2 if kind == "bf16" else 4
    assert all(one.state.nbytes == size * one.placement.numel for one in observer.held.values())
    with pytest.raises(NotImplementedError, match="on disk alone"):
        observer.window()
