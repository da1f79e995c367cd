"""Beginning a trajectory, going on with one, and refusing what belongs to another run."""

import json
from pathlib import Path

import pytest
import torch
from fakes import DriftingModel, RankSource
from pipeline import PREDICTION, RUN, STEPS, predicted, train, weights_of
from safetensors.torch import save_file

from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import extrapolate
from relex_verl.trajectory import replay
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.store import Trajectory


def test_a_file_without_its_index_entry_is_ignored(base: Path, tmp_path: Path) -> None:
    """SIGKILL between the file and the index: the step does not count, and its file is overwritten by the next try."""
    train(tmp_path, base, "bf16", steps=[1, 2, 3])
    index = tmp_path / "trajectory" / "index.json"
    content = json.loads(index.read_text())
    content["windows"][0]["steps"] = [1, 2]
    index.write_text(json.dumps(content))
    model = DriftingModel(weights_of(base))
    observer = Observer(tmp_path / "trajectory", str(base), {}, RUN, KINDS["bf16"])
    observer.start(RankSource(model.at(0)))
    observer.open(3)
    assert observer.steps == [1, 2]
    observer.observe(3, RankSource(model.at(3)))
    assert Trajectory(tmp_path / "trajectory").steps == [1, 2, 3]


def test_origin_that_is_not_the_base_is_stored(base: Path, tmp_path: Path) -> None:
    start = {name: tensor.float() + 0.5 for name, tensor in weights_of(base).items()}
    observer = Observer(tmp_path / "trajectory", str(base), {}, RUN, KINDS["bf16"])
    observer.start(RankSource(start))
    observer.open(0)
    moved = {name: tensor * 1.01 for name, tensor in start.items()}
    observer.observe(1, RankSource(moved))
    trajectory = Trajectory(tmp_path / "trajectory")
    assert trajectory.record.origin == "stored"
    for step, expected in ((0, start), (1, moved)):
        for shard in replay.states(trajectory, step):
            assert torch.equal(shard.data, expected[shard.name].to(torch.bfloat16).flatten())


@pytest.mark.parametrize("kind", ["bf16", "fp32-int8"])
def test_files_that_a_crashed_node_left_empty_are_trained_again(base: Path, kind: str, tmp_path: Path) -> None:
    train(tmp_path, base, kind, steps=[1, 2, 3, 5])
    (tmp_path / "trajectory" / "window_000/rank_00000" / "step_000003.safetensors").write_bytes(b"")
    model = DriftingModel(weights_of(base))
    observer = Observer(tmp_path / "trajectory", str(base), {}, RUN, KINDS[kind])
    observer.start(RankSource(model.at(0)))
    observer.open(5)
    assert observer.steps == [1, 2]


def test_another_runs_folder_is_refused(base: Path, tmp_path: Path) -> None:
    train(tmp_path, base, "bf16", steps=[1, 2])
    for run, kind in (({**RUN, "experiment": "other"}, "bf16"), (RUN, "fp32-int8")):
        observer = Observer(tmp_path / "trajectory", str(base), {}, run, KINDS[kind])
        observer.start(RankSource(DriftingModel(weights_of(base)).at(0)))
        with pytest.raises(TrajectoryError, match=r"another run \((experiment|encoding)"):
            observer.open(2)
    assert Trajectory(tmp_path / "trajectory").steps == [1, 2]


def test_engine_tensors_unknown_to_the_base_are_refused(base: Path, tmp_path: Path) -> None:
    weights = weights_of(base)
    observer = Observer(tmp_path, str(base), {}, RUN, KINDS["bf16"])
    with pytest.raises(ValueError, match="not in the base checkpoint"):
        observer.start(RankSource({**weights, "extra.weight": torch.zeros(3)}))
    name = next(iter(weights))
    with pytest.raises(ValueError, match="has shape"):
        observer.start(RankSource({**weights, name: torch.zeros(3, 3)}))


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weights = {"a.weight": torch.ones(3, 3), "a.scale": torch.ones(1)}
    save_file(weights | {"a.weight": torch.ones(3, 3).to(torch.float8_e4m3fn)}, tmp_path / "base" / "model.safetensors")
    observer = Observer(tmp_path, str(tmp_path / "base"), {}, RUN, KINDS["bf16"])
    with pytest.raises(ValueError, match=r"a\.weight is stored as F8_E4M3 .* give a base that is not quantised"):
        observer.start(RankSource(weights))


@pytest.mark.parametrize("kind", ["bf16", "fp32-int8", "sketch-4"])
def test_predictions_start_from_an_origin_that_is_not_the_base(base: Path, kind: str, tmp_path: Path) -> None:
    """In the run and from the files alone; the weights lie 0.5 from the base all the while."""
    start = {name: tensor.float() + 0.5 for name, tensor in weights_of(base).items()}
    model, observer = DriftingModel(start), Observer(tmp_path, str(base), {}, RUN, KINDS[kind])
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    for step in STEPS:
        observer.observe(step, RankSource(model.at(step)))
    observer.save()
    online = {shard.name: shard.data for shard in predicted(observer)}
    for shard in extrapolate(Trajectory(tmp_path), STEPS[-1], PREDICTION):
        assert torch.equal(online[shard.name], shard.data)
        assert float((shard.data.float() - start[shard.name].flatten()).abs().max()) < 0.1
