"""Finished runs for the tests of ingest: a base, checkpoints in verl's layout, and their trajectory."""

import json
import shutil

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fakes import DriftingModel, RankSource, tiny_base
from safetensors.torch import load_file, save_file

from relex_verl.maths.extrapolators import Prediction
from relex_verl.offline.ingest import Options, find_checkpoints, ingest, select_steps
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import extrapolate
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.store import Trajectory

STEPS = (1, 2, 5, 9)
NORM = "model.norm.weight"


def read(folder):
    """All tensors of a checkpoint."""
    checkpoint = BaseCheckpoint(folder)
    return {name: checkpoint.read(name).clone() for name in checkpoint.entries}


def write_run(root, steps=STEPS, dtype=torch.bfloat16, inside=".", **base):
    """A base and checkpoints of a run that started there."""
    start = tiny_base(root / "base", **base)
    model = DriftingModel(read(start))
    for step in steps:
        folder = root / "run" / f"global_step_{step}" / inside
        shutil.copytree(start, folder)
        index = folder / "model.safetensors.index.json"
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
        weights = {name: tensor.to(dtype) for name, tensor in model.at(step).items()}
        for file in files:
            save_file({name: weights[name] for name in load_file(folder / file)}, folder / file, {"format": "pt"})
    return start, root / "run"


def run(root, out="trajectory", steps=None, options=None, **more):
    """Ingest what `write_run` wrote."""
    found = select_steps(find_checkpoints(root / "run"), steps)
    return ingest(str(root / "base"), found, "the run", root / out, options or Options(), **more)


def change(root, step, how):
    """Spoil the checkpoint of a step."""
    path = root / "run" / f"global_step_{step}" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    how(tensors)
    save_file(tensors, path, {"format": "pt"})


def predicted(trajectory, target=40):
    """RELEX from all rows."""
    shards = extrapolate(trajectory, trajectory.steps[-1], Prediction("relex", target))
    parts = {}
    for shard in shards:
        parts.setdefault(shard.name, []).append(shard)
    return {name: _whole(shards) for name, shards in parts.items()}


def _whole(shards):
    flat = torch.empty(torch.Size(shards[0].shape).numel(), dtype=shards[0].data.dtype)
    for shard in shards:
        for local, full, length in shard.placement.runs():
            flat[full : full + length] = shard.data[local : local + length]
    return flat


def observe(out, base, encoding, rank=0, world=1):
    """One rank of a run that observes itself: the steps of `write_run`."""
    model = DriftingModel(read(base))
    observer = Observer(out, str(base), {}, {}, KINDS[encoding])
    observer.start(RankSource(model.at(0), rank, world))
    observer.open(0)
    for step in STEPS:
        observer.observe(step, RankSource(model.at(step), rank, world))


def _observe_rank(rank, out, base, encoding):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    try:
        observe(out, base, encoding, rank, 2)
    finally:
        dist.destroy_process_group()


def observed(out, base, encoding, world):
    """The trajectory of such a run on one rank or two."""
    if world == 1:
        observe(out, base, encoding)
    else:
        mp.spawn(_observe_rank, args=(out, base, encoding), nprocs=2)
    return Trajectory(out)
