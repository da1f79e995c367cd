"""Adapters before the first step: written by all ranks, and taken up by a start that has drawn others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import DriftingModel, RankSource
from pipeline import RUN, on_two_ranks, predicted
from safetensors.torch import load_file

from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.resuming import find
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.store import ADAPTER_FOLDER, Trajectory

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
FILE = "adapter_model.safetensors"


def drawn(seed: int) -> dict[str, torch.Tensor]:
    """Adapters as a start draws them: A at random, B zero."""
    generator, adapters = torch.Generator().manual_seed(seed), {}
    for layer in ("base_model.model.model.layers.0.mlp.up_proj", "base_model.model.model.layers.0.mlp.down_proj"):
        adapters[f"{layer}.lora_A.weight"] = torch.randn(4, 128, generator=generator)
        adapters[f"{layer}.lora_B.weight"] = torch.zeros(192, 4)
    return adapters


def observer_of(folder: Path, kind: str, start: dict[str, torch.Tensor], rank: int = 0, world: int = 1) -> Observer:
    observer = Observer(folder, "base", {}, RUN, KINDS[kind], adapters=CONFIG)
    observer.start(RankSource(start, rank, world))
    return observer


def follow(observer: Observer, steps: range, rank: int = 0, world: int = 1) -> None:
    """Steps of a run that began with `drawn(0)`."""
    model = DriftingModel(drawn(0))
    for step in steps:
        observer.observe(step, RankSource(model.at(step), rank, world))
    observer.save()


def write_on_a_rank(rank: int, world: int, out: Path) -> None:
    observer = observer_of(out, "fp32-int8", drawn(0), rank, world)
    observer.open(0)
    follow(observer, range(1, 4), rank, world)
    shards = {shard.name: shard.data.float() for shard in predicted(observer)}
    torch.save(shards, out.parent / f"{rank}.pt")


@pytest.mark.parametrize("world", [1, 2])
def test_theta_0_is_written_by_all_ranks(tmp_path: Path, world: int) -> None:
    out = tmp_path / "trajectory"
    if world == 1:
        write_on_a_rank(0, 1, out)
    else:
        on_two_ranks(write_on_a_rank, out)
    stored = load_file(out / ADAPTER_FOLDER / FILE)
    assert stored.keys() == drawn(0).keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in drawn(0).items())
    trajectory = Trajectory(out)
    assert trajectory.base().folder == out / ADAPTER_FOLDER
    assert trajectory.record.origin == "base"
    assert {path.name for path in out.iterdir()} == {"index.json", ADAPTER_FOLDER, "window_000"}


@pytest.mark.parametrize("kind", ["fp32-int8", "bf16", "sketch-4"])
@pytest.mark.parametrize("stop", [0, 3])
def test_a_start_that_has_drawn_others_goes_on_from_the_first(tmp_path: Path, kind: str, stop: int) -> None:
    """With rows before the step that it resumes from, and without."""
    results = []
    for name, seed in (("whole", 0), ("resumed", 7)):
        observer = observer_of(tmp_path / name, kind, drawn(0))
        observer.open(0)
        follow(observer, range(1, stop + 1))
        if seed:
            observer = observer_of(tmp_path / name, kind, drawn(seed))
            observer.open(stop or 1)
        follow(observer, range(stop + 1, 7))
        results.append([shard.data for shard in predicted(observer)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("there", ["nothing", "other adapters"])
def test_without_the_first_start_there_is_no_origin(tmp_path: Path, there: str) -> None:
    if there == "other adapters":
        larger = {name: torch.zeros(2 * len(tensor), tensor.shape[1]) for name, tensor in drawn(0).items()}
        observer_of(tmp_path / "t", "fp32-int8", larger).open(0)
    observer = observer_of(tmp_path / "t", "fp32-int8", drawn(0))
    with pytest.raises(TrajectoryError, match=r"resumes after step 4, .* begin anew"):
        observer.open(4)
    assert (tmp_path / "t").exists() == (there == "other adapters")


def test_whole_weights_do_not_go_on_with_adapters(tmp_path: Path) -> None:
    observer = observer_of(tmp_path / "t", "fp32-int8", drawn(0))
    observer.open(0)
    follow(observer, range(1, 3))
    weights = Observer(tmp_path / "t", "base", {}, RUN, KINDS["fp32-int8"])
    index = replace(observer.trajectory.index, adapters=False)
    with pytest.raises(TrajectoryError, match="adapters True there, False here"):
        find(weights.ranks, tmp_path / "t", index, 2)
