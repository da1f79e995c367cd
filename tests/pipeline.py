"""The pipeline below verl as a rank of a run drives it, on one process and on two gloo ranks."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fakes import DriftingModel, RankSource

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import predicted_tensors, write_together
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import TensorShard

RUN = {"project": "p", "experiment": "e"}
STEPS = [1, 2, 3, 5, 6, 9, 10]
PREDICTION = Prediction("relex", 40)


def weights_of(base: Path) -> dict[str, torch.Tensor]:
    checkpoint = BaseCheckpoint(base)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def predicted(observer: Observer) -> Iterator[TensorShard]:
    """This rank's part of PREDICTION."""
    return predicted_tensors(observer.histories(), observer.kind, observer.window(), PREDICTION)


def train(out: Path, base: Path, kind: str, rank: int = 0, world: int = 1, steps: list[int] = STEPS) -> Observer:
    """Observe a drifting model and write one prediction, as a rank of a run does."""
    model = DriftingModel(weights_of(base))
    observer = Observer(out / "trajectory", str(base), {}, RUN, KINDS[kind])
    observer.start(RankSource(model.at(0), rank, world))
    observer.open(0)
    for step in steps:
        observer.observe(step, RankSource(model.at(step), rank, world))
    observer.save()
    shards, folder = predicted(observer), out / PREDICTION.folder_name
    write_together(observer.ranks, observer.base, {}, observer.shapes, shards, folder, {"method": "relex"})
    return observer


def rank_main(rank: int, world: int, work: Callable[..., None], port: int, *args: object) -> None:
    dist.init_process_group("cpu:gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    work(rank, world, *args)
    dist.destroy_process_group()


def on_two_ranks(work: Callable[..., None], *args: object) -> None:
    """Run a function of a module on two processes that talk to each other: work(rank, world, *args)."""
    on_ranks(2, work, *args)


def on_ranks(world: int, work: Callable[..., None], *args: object) -> None:
    """The same on any number of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_main, args=(world, work, port, *args), nprocs=world)


def train_rank(rank: int, world: int, out: Path, base: Path, kind: str) -> None:
    train(out, base, kind, rank, world)
