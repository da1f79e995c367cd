"""One rank as the driver asks it: what is recorded after the last cut, and the weights that are kept."""

from pathlib import Path

import pytest
import torch
from fakes import DriftingModel
from pipeline import weights_of
from ranks import rank_of
from shell import weights

from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory


@pytest.mark.parametrize("trajectory", ["bf16", "fp32"])
def test_a_recorded_row_says_what_it_is_by_itself(base: Path, tmp_path: Path, trajectory: str) -> None:
    rank, engine = rank_of(base, tmp_path, trajectory=trajectory, record="run")
    assert "3 rows and 17 more, on disk alone," in rank.start().cost
    rank.open(0)
    for engine.step in (1, 2, 3):
        assert "relex/explained_variance/mean" in rank.observe(engine.step, now=True)
    rank.record()
    for engine.step in (4, 5):
        seen = rank.observe(engine.step, now=True)
        assert sorted(seen) == ["relex/changed_share", "relex/observed_step", "relex/seconds", "relex/stored_bytes"]
    stored = sum(int(Trajectory(tmp_path / "trajectory").load(0, n).bytes_of_tensors().sum()) for n in range(1, 6))
    assert seen["relex/stored_bytes"] == stored
    again, engine = rank_of(base, tmp_path, trajectory=trajectory, record="run")
    again.start()
    assert again.open(5, recording=True).steps == [1, 2, 3, 4, 5]
    engine.step = 6
    assert again.observe(6, now=True)["relex/stored_bytes"] > stored


@pytest.mark.parametrize("trajectory", ["bf16", "fp32", "sketch"])
def test_the_weights_that_are_kept_are_the_engines(base: Path, tmp_path: Path, trajectory: str) -> None:
    """In the base's types, whatever is recorded of them, and after the last cut too."""
    rank, engine = rank_of(base, tmp_path, trajectory=trajectory)
    rank.start()
    rank.open(0)
    for engine.step in (1, 2, 3):
        rank.observe(engine.step, now=True)
    rank.record()
    engine.step = 4
    rank.keep(tmp_path / "kept", {"step": 4})
    kept, true = weights(tmp_path / "kept"), DriftingModel(weights_of(base)).at(4)
    assert all(torch.equal(kept[name], tensor.to(kept[name].dtype)) for name, tensor in true.items())
    if trajectory == "bf16":
        rank.observe(4, now=True)
        states = {shard.name: shard.data for shard in replay.states(Trajectory(tmp_path / "trajectory"), 4)}
        assert all(torch.equal(kept[name].flatten(), data) for name, data in states.items())


@pytest.mark.parametrize("trajectory", ["bf16", "sketch"])
def test_the_figures_of_a_row_are_of_a_sample_and_those_of_a_cut_of_all(
    base: Path, tmp_path: Path, trajectory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relex_verl.run.rank.SAMPLE", 1)
    rank, engine = rank_of(base, tmp_path, trajectory=trajectory, overlap=False)
    rank.start()
    rank.open(0)
    for engine.step in (1, 2):
        sampled = rank.observe(engine.step, now=False)
    engine.step = 3
    everything = rank.observe(3, now=True)
    name = "relex/explained_variance"
    assert sampled[f"{name}/mean"] == sampled[f"{name}/min"] == sampled[f"{name}/p10"]
    assert everything[f"{name}/mean"] > everything[f"{name}/min"]
