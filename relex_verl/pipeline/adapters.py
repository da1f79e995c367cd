"""LoRA adapters before the first step, on disk: no base model has them, so that the trajectory keeps its own.

B starts at zero and A at random, and the frozen base is not followed. What the ranks write here is theta_0 and, as a PEFT
folder, the layout of every checkpoint that is written from the trajectory.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from relex_verl.pipeline.collectives import Collectives
from relex_verl.pipeline.prediction import write_together
from relex_verl.reporting.provenance import Checkout
from relex_verl.trajectory.collectors import Held
from relex_verl.trajectory.files import save_tensors, write_json
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.index import TrajectoryError, TrajectoryIndex
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import ADAPTER_FOLDER, Trajectory

__all__ = ["take_first_origin", "write_origin"]

FILE = "adapter_model.safetensors"


def write_origin(
    ranks: Collectives,
    trajectory: Path,
    index: TrajectoryIndex,
    config: Mapping[str, Any],
    held: Mapping[str, Held],
) -> None:
    """Write theta_0 into a trajectory's folder, float32, each rank its own elements.

    Args:
        ranks: all of them.
        trajectory: its folder.
        index: what it says.
        config: the content of `adapter_config.json`.
        held: this rank's shards, with theta_0.
    """
    empty, folder = trajectory / ".empty", trajectory / ADAPTER_FOLDER
    with ranks.together():
        if ranks.rank == 0:
            empty.mkdir(parents=True)
            write_json(empty / "adapter_config.json", dict(config))
            save_tensors(empty / FILE, {name: torch.zeros(shape) for name, shape in index.tensors.items()})
    with ranks.together():
        layout = BaseCheckpoint(empty)
    facts = Checkout.of(0, 0.0, index.base_model, trajectory).to_json()
    shards = (TensorShard(name, shard.shape, shard.placement, shard.state) for name, shard in held.items())
    write_together(ranks, layout, {}, index.tensors, shards, folder, facts)
    with ranks.together():
        if ranks.rank == 0:
            shutil.rmtree(empty)


def take_first_origin(
    ranks: Collectives, trajectory: Path, tensors: Mapping[str, list[int]], held: Mapping[str, Held], step: int
) -> None:
    """Take theta_0 from an earlier start of the run: A is drawn anew at each, and then overwritten by verl's checkpoint.

    Args:
        ranks: all of them.
        trajectory: its folder.
        tensors: name -> shape of the adapters that are trained now.
        held: this rank's shards, overwritten.
        step: the training step that is resumed from.

    Raises:
        TrajectoryError: no earlier start left it.
    """
    with ranks.together():
        earlier = Trajectory(trajectory) if (trajectory / "index.json").exists() else None
        if earlier is None or not earlier.index.adapters or earlier.index.tensors != tensors:
            raise TrajectoryError(
                f"training resumes after step {step}, and relex.output_dir={trajectory.parent} does not hold the "
                "adapters of this run before its first step, from which changes are counted: give the output_dir of its "
                "first start, begin anew (trainer.resume_mode=disable), or train without +relex"
            )
        first = earlier.base()
        for name, shard in held.items():
            shard.state.copy_(first.read(name, shard.placement))
