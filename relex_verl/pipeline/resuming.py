"""Begin a trajectory on disk, or go on with the one that is there: all ranks together, before the first step."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from relex_verl.pipeline.adapters import write_origin
from relex_verl.pipeline.collectives import Collectives
from relex_verl.trajectory.collectors import Held
from relex_verl.trajectory.fingerprint import of_tensors
from relex_verl.trajectory.going_back import forget, readable_until, window_at
from relex_verl.trajectory.hf_checkpoint import FLOATS, BaseCheckpoint
from relex_verl.trajectory.index import TrajectoryError, TrajectoryIndex, WindowRecord
from relex_verl.trajectory.store import Trajectory

__all__ = ["appears", "check_aliases", "check_names", "create", "find"]

NOT_SHARED = "relex.output_dir must lie on a file system that all nodes share"
# A network file system may go on for a while to say that a file is not there, once it has been asked.
PATIENCE_SECONDS = 60.0


def find(ranks: Collectives, folder: Path, index: TrajectoryIndex, step: int) -> Trajectory | None:
    """The trajectory of this run that is there already, if it has something to go on with. Nothing on disk changes.

    Args:
        ranks: all of them.
        folder: of the trajectory.
        index: what this run's would say; only what identifies the run is compared.
        step: the training step that is resumed from.

    Returns:
        The window to go on in, cut back to the steps that are kept, without the windows that began later. A later window
        than the first may have no steps left, but its origin; of the first one None is then the answer.

    Raises:
        TrajectoryError: it is that of another run, not all ranks see it, or the window's origin is damaged.
    """
    existing: Trajectory | None = None
    with ranks.together():
        if (folder / "index.json").exists():
            existing = Trajectory(folder)
            _check_same_run(existing.index, index, folder)
    seen = ranks.gather(existing is not None)
    with ranks.together():
        if any(seen) != all(seen):
            raise TrajectoryError(f"some ranks see a trajectory in {folder} and others do not: {NOT_SHARED}")
    window: Trajectory | None = None
    with ranks.together():
        window = None if existing is None else window_at(existing, step)
    written_by: Sequence[int] = []  # whose files this rank looks at
    readable = step
    with ranks.together():
        if window is not None:
            written_by = range(ranks.rank, window.index.world_size, ranks.world_size)
            for rank in written_by:
                _check_there(window, rank)
                # A node that crashed may have left its last files empty, although the index names them.
                readable = min(readable, readable_until(window, rank, step))
    readable = min(ranks.gather(readable))
    if window is None:
        return None
    forget(window, readable)
    if not window.number and not window.steps:
        index.given_up = window.index.given_up  # for the one that takes its place
        return None
    with ranks.together():
        for rank in written_by:
            _check_origin(window, rank)
    return window


def _check_there(window: Trajectory, rank: int) -> None:
    """What is left where a rank's files are gone, as with a node and its disk, says nothing of the whole weights."""
    if window.steps and not (window.rank_folder(rank) / "placements.json").exists():
        raise TrajectoryError(
            f"{window.rank_folder(rank)}, which rank {rank} of {window.index.world_size} wrote, is missing, and without it "
            "the weights of this trajectory are not whole. Put it back, or give this run its own relex.output_dir (on a "
            "file system that all nodes share)"
        )


def _check_origin(window: Trajectory, rank: int) -> None:
    try:
        window.origin(rank, window.base(), window.placements(rank)).check()
    except TrajectoryError as error:
        begun = window.record.origin_step
        raise TrajectoryError(
            f"{error}. Without its origin, the window that began at step {begun} is lost: resume from a checkpoint before "
            "that step (trainer.resume_mode=resume_path), or give this run its own relex.output_dir"
        ) from error


def create(
    ranks: Collectives,
    folder: Path,
    index: TrajectoryIndex,
    held: Mapping[str, Held],
    states: torch.Tensor,
    base: BaseCheckpoint | Mapping[str, Any],
) -> Trajectory:
    """Begin one, in place of what is there.

    Args:
        ranks: all of them.
        folder: of the trajectory.
        index: what it says; whether theta_0 is the base model is found out here.
        held: this rank's shards, with theta_0.
        states: their theta_0 end to end.
        base: the base model; of adapters the content of their `adapter_config.json`.

    Raises:
        TrajectoryError: a rank does not see what rank 0 writes.
    """
    is_base = True  # adapters: what is read as theta_0 is written here
    with ranks.together():
        if isinstance(base, BaseCheckpoint):
            if ranks.rank == 0:
                index.base_fingerprint = of_tensors(base)
            is_base = all(_same_bits(base.read(name, shard.placement), shard.state) for name, shard in held.items())
    everywhere_base = all(ranks.gather(is_base))
    if index.encodings and not everywhere_base:  # their states do not lie end to end
        raise TrajectoryError(
            "tensors in kinds of their own are followed only in a run that starts from its base model"
        )
    with ranks.together():
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if not isinstance(base, BaseCheckpoint):
        write_origin(ranks, folder, index, base, held)
    with ranks.together():
        if ranks.rank == 0:
            index.windows = [WindowRecord(0, "base" if everywhere_base else "stored")]
            Trajectory.create(folder, index)
    with ranks.together():
        if not appears(folder / "index.json"):
            raise TrajectoryError(f"rank {ranks.rank} does not see {folder}, which rank 0 made: {NOT_SHARED}")
        trajectory = Trajectory(folder)
        placements = {name: shard.placement for name, shard in held.items()}
        trajectory.declare_rank(ranks.rank, placements, None if everywhere_base else states)
    return trajectory


def check_names(tensors: Sequence[tuple[str, tuple[int, ...]]], base: BaseCheckpoint) -> None:
    """Whether the engine's tensors are the base model's.

    Args:
        tensors: name and shape of each.
        base: the base model.

    Raises:
        ValueError: a tensor that the base does not have, or has in another shape, or quantised.
    """
    unknown = sorted({name for name, _ in tensors} - set(base.entries))
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors of the engine are not in the base checkpoint {base.folder}, e.g. "
            f"{unknown[:3]}: RELEX writes checkpoints laid out like the base and would not know where they belong"
        )
    quantised = next((name for name, _ in tensors if base.entries[name].dtype not in FLOATS), None)
    if quantised is not None:
        raise ValueError(
            f"{quantised} is stored as {base.entries[quantised].dtype} in the base checkpoint {base.folder}, and trained as "
            "floating-point numbers: give a base that is not quantised"
        )
    for name, shape in tensors:
        if shape != base.entries[name].shape:
            raise ValueError(
                f"{name} has shape {shape} in the engine, {base.entries[name].shape} in the base checkpoint"
            )


def check_aliases(aliases: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether tied names lead to tensors that the engine hands out; ValueError where one does not."""
    for alias, name in aliases.items():
        if name not in shapes:
            raise ValueError(f"{alias} is tied to {name}, which the engine does not hand out")


def appears(path: Path, patience: float = PATIENCE_SECONDS) -> bool:
    """Whether a file that another process has made is seen here, within some seconds."""
    until = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _check_same_run(there: TrajectoryIndex, here: TrajectoryIndex, folder: Path) -> None:
    expected, there_says = _identity(here), _identity(there)
    differing = {key: (there_says.get(key), value) for key, value in expected.items() if there_says.get(key) != value}
    if differing:
        said = "; ".join(f"{key} {old!r} there, {new!r} here" for key, (old, new) in differing.items())
        raise TrajectoryError(
            f"relex.output_dir={folder.parent} holds the trajectory of another run ({said}). "
            "Give this run its own relex.output_dir, or remove that folder"
        )


def _identity(index: TrajectoryIndex) -> dict[str, object]:
    facts = {"base model": index.base_model, "encoding": index.encoding, "adapters": index.adapters}
    return {**facts, **index.run}


def _same_bits(stored: torch.Tensor, state: torch.Tensor) -> bool:
    return torch.equal(stored.to(state.dtype).contiguous().view(torch.uint8), state.contiguous().view(torch.uint8))
