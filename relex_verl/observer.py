"""The one pipeline, online and offline: shards -> increments -> trajectory -> H and G -> weights -> predicted tensors.

`Observer` is one rank's part of a running training; `prediction.extrapolate` does the same later from the trajectory on
disk. Both end in `predicted_tensors`, so a prediction has the same bits whichever way it was made.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relex_verl import collectives
from relex_verl.collectors import Held, collector_of
from relex_verl.encodings import ENCODINGS, Encoding, RowEncoding
from relex_verl.hf_checkpoint import BaseCheckpoint, CheckpointWriter, resolve_model
from relex_verl.prediction import Prediction, predicted_tensors
from relex_verl.replay import ShardHistory
from relex_verl.shards import Placement, ShardSource, TensorShard, check_cover, share_out
from relex_verl.trajectory import Trajectory, TrajectoryError, TrajectoryIndex, Window

__all__ = ["Observation", "Observer"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observation:
    """One observed step, summed over the ranks.

    Attributes:
        step: the training step.
        changed_share: share of the weights whose change since the row before was not 0 (as the encoding keeps it); NaN for a
            sketch, which does not keep the row before.
        stored_bytes: bytes that the trajectory holds (those of a sketch are written by `save`).
    """

    step: int
    changed_share: float
    stored_bytes: int


class Observer:
    """Follows the weights of one rank of a training run. All ranks call the same methods in the same order.

    Methods raise on every rank when one fails (`PeerError` on the others), so that no rank is left waiting.
    """

    def __init__(
        self, folder: Path, base_model: str, aliases: Mapping[str, str], run: Mapping[str, Any], encoding: str = "bf16"
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: of the trajectory.
            base_model: folder or Hub id of the base model.
            aliases: tied name -> the name that it shares its elements with.
            run: what identifies the training run.
            encoding: how increments are kept, see `encodings.ENCODINGS`.
        """
        self.encoding_name = encoding
        self.encoding: Encoding = ENCODINGS[encoding]
        self.folder, self.base_model, self.aliases, self.run = folder, base_model, dict(aliases), dict(run)
        self.base = BaseCheckpoint(resolve_model(base_model))
        self.collector = collector_of(encoding)
        self.held: dict[str, Held] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of all tensors of all ranks, in the order of the stacks
        self.stored_bytes = 0
        self._trajectory: Trajectory | None = None

    # Start and resume

    def start(self, source: ShardSource) -> None:
        """Take theta_0, before any checkpoint is loaded: who counts what, and whether it is the base model.

        Raises:
            ValueError: a tensor is not in the base checkpoint, or its elements are not covered exactly once.
        """
        with _together():
            found = [(shard.name, shard.shape, shard.placement) for shard in source]
            self._check_names(found)
        counted = share_out(collectives.gather(found))
        mine = counted[collectives.rank()]
        with _together():
            self.shapes = check_cover(counted)
            for shard in source:
                if shard.name in mine:
                    state = shard.data.detach().to("cpu", self.encoding.dtype, copy=True)
                    self.held[shard.name] = Held(shard.shape, shard.placement, state)
            self.collector.begin(self.held, len(self.shapes))

    def open(self, step: int) -> None:
        """Begin a trajectory on disk, or go on with the one of this run after `step` (0: from the start).

        Raises:
            TrajectoryError: the folder holds the trajectory of another run, or of another number of ranks.
        """
        existing = None
        with _together():
            if (self.folder / "index.json").exists():
                existing = Trajectory(self.folder)
                self._check_same_run(existing)
        if existing is not None and existing.kept_after(step):
            self._resume(existing, step)
        else:
            self._create()

    def _create(self) -> None:
        is_base = False
        with _together():
            is_base = all(
                torch.equal(_bits(self.base.read(name, held.placement).to(self.encoding.dtype)), _bits(held.state))
                for name, held in self.held.items()
            )
        everywhere_base = all(collectives.gather(is_base))
        with _together():
            if collectives.rank() == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
                Trajectory.create(self.folder, self._new_index("base" if everywhere_base else "stored"))
        with _together():
            if not (self.folder / "index.json").exists():
                raise TrajectoryError(
                    f"rank {collectives.rank()} does not see {self.folder}, which rank 0 made: relex.output_dir must "
                    "lie on a file system that all nodes share"
                )
            self._trajectory = Trajectory(self.folder)
            placements = {name: held.placement for name, held in self.held.items()}
            parts = None if everywhere_base else [held.state for held in self.held.values()]
            self._trajectory.declare_rank(collectives.rank(), placements, parts)

    def _new_index(self, origin: str) -> TrajectoryIndex:
        tensors = {name: list(shape) for name, shape in self.shapes.items()}
        ranks = collectives.world_size()
        windows = [Window(0, origin)]
        return TrajectoryIndex(self.base_model, self.encoding_name, ranks, tensors, self.aliases, self.run, windows)

    def _resume(self, existing: Trajectory, step: int) -> None:
        rank = collectives.rank()
        with _together():
            placements = existing.placements(rank)
            if placements != {name: held.placement for name, held in self.held.items()}:
                raise TrajectoryError(f"{self.folder} was written with the weights cut otherwise between the ranks")
            existing.forget(step)
            self.collector.resume(existing, rank, step)
        with _together():
            if rank == 0:
                existing.truncate(step)
        self.stored_bytes = sum(collectives.gather(self.collector.nbytes))
        self._trajectory = existing

    # Observe

    @property
    def steps(self) -> list[int]:
        """The observed steps."""
        return self.collector.steps

    def observe(self, step: int, source: ShardSource) -> Observation:
        """Add one row: the change of every tensor since the row before. Nothing is kept of it if a rank fails.

        Raises:
            ValueError: weights that are not finite; shards that differ from the first time.
        """
        with _together():
            figures_lk, changed, file = self.collector.take(step, self._counted(source))
            if file is not None:
                self.trajectory.append(collectives.rank(), step, file)
        figures_Lk = torch.zeros(len(self.shapes), figures_lk.shape[1], dtype=torch.float64)
        figures_Lk[self._rows_held()] = figures_lk
        elements = sum(held.placement.numel for held in self.held.values())
        written = 0 if file is None else file.nbytes
        counts = torch.tensor([changed, elements, written], dtype=torch.float64)
        total = collectives.sum_over_ranks(torch.cat([figures_Lk.flatten(), counts]))
        if file is not None:
            self._commit(step)
        # From here on nothing can fail on one rank alone.
        self.collector.keep(step, total[:-3].view_as(figures_Lk))
        changed, elements, written = total[-3:].tolist()
        self.stored_bytes += int(written)
        return Observation(step, changed / elements, self.stored_bytes)

    def save(self) -> None:
        """Put on disk what only memory holds, for a run that resumes after this step: a sketch. Rows are there already."""
        with _together():
            whole = self.collector.snapshot()
            if whole is not None:
                self.trajectory.append(collectives.rank(), self.steps[-1], whole)
        if whole is not None:
            with _together():
                if collectives.rank() == 0:
                    self.trajectory.commit_sketch(self.steps)
            self.stored_bytes = int(collectives.sum_over_ranks(torch.tensor([float(whole.nbytes)])).item())

    def _commit(self, step: int) -> None:
        with _together():
            if collectives.rank() == 0:
                self.trajectory.commit(step)
            else:
                self.trajectory.steps.append(step)

    def _counted(self, source: ShardSource) -> Iterator[tuple[int, Held, torch.Tensor]]:
        """The shards that this rank counts, with their positions: all of them, in the same order as at the start."""
        names, i = list(self.held), 0
        for shard in source:
            if shard.name not in self.held:
                continue
            if i == len(names) or shard.name != names[i] or shard.placement != self.held[names[i]].placement:
                raise ValueError(f"{shard.name}: the engine cuts or orders its weights otherwise than at the start")
            yield i, self.held[shard.name], shard.data.detach()
            i += 1
        if i != len(names):
            raise ValueError(f"the engine handed out {i} of the {len(names)} shards that it had at the start")

    def _rows_held(self) -> list[int]:
        """Positions in the stacks of the tensors that this rank holds."""
        position = {name: i for i, name in enumerate(self.shapes)}
        return [position[name] for name in self.held]

    # Predict

    def gram(self) -> torch.Tensor:
        """G of all rows so far, (L, T, T), the same on every rank; for a sketch smoothed to polynomials."""
        return self.collector.gram()

    def histories(self) -> Iterator[ShardHistory]:
        """This rank's shards with all that is kept of them, in the order of the stacks."""
        index = {name: i for i, name in enumerate(self.held)}
        from_last = isinstance(self.encoding, RowEncoding) and self.encoding.anchor_is_last
        placements = {name: held.placement for name, held in self.held.items()}
        origin = self.trajectory.origin(collectives.rank(), self.base, placements)
        for name in self.shapes:
            if name in self.held:
                held = self.held[name]
                anchor = held.state if from_last else origin[name]
                yield ShardHistory(name, held.shape, held.placement, anchor, self.collector.parts(index[name]))

    def predicted_tensors(self, prediction: Prediction) -> Iterator[TensorShard]:
        """This rank's part of the predicted checkpoint, tensor by tensor."""
        names, gram_LTT = list(self.shapes), self.gram()
        return predicted_tensors(self.histories(), self.encoding, names, gram_LTT, self.steps, prediction)

    def whole_tensors(self, shards: Iterator[TensorShard], device: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Put the ranks' shards together, one tensor at a time: what a rollout engine wants. Collective, to the end.

        Args:
            shards: this rank's, in the order of the stacks.
            device: where the whole tensors go.

        Yields:
            Name and whole tensor, bfloat16, on each rank; a tied name follows the one that it shares its elements with.
        """
        shard = next(shards, None)
        for name, shape in self.shapes.items():
            flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.bfloat16, device=device)
            while shard is not None and shard.name == name:
                data = shard.data.to(device, torch.bfloat16)
                for local, full, length in shard.placement.runs():
                    flat[full : full + length] = data[local : local + length]
                shard = next(shards, None)
            tensor = collectives.merge(flat).view(shape)
            yield name, tensor
            yield from ((alias, tensor) for alias, held in self.aliases.items() if held == name)

    def observed_now(self, source: ShardSource) -> Iterator[TensorShard]:
        """This rank's shards as the engine holds them, rounded to bfloat16, in the order of the stacks."""
        mine = {}
        for shard in source:
            if shard.name in self.held:
                mine[shard.name] = TensorShard(
                    shard.name, shard.shape, shard.placement, shard.data.to(torch.bfloat16, copy=True)
                )
        return (mine[name] for name in self.shapes if name in mine)

    def write_prediction(self, prediction: Prediction, folder: Path, provenance: Mapping[str, Any]) -> Path:
        """Write the predicted checkpoint together: every rank puts its own elements into the shared files."""
        writer = CheckpointWriter(self.base, folder, set(self.shapes), self.aliases)
        with _together():
            if collectives.rank() == 0:
                writer.begin()
        with _together():
            for shard in self.predicted_tensors(prediction):
                writer.write(shard)
        with _together():
            if collectives.rank() == 0:
                writer.commit(provenance)
        return folder

    @property
    def trajectory(self) -> Trajectory:
        """The store on disk; `open` comes first."""
        assert self._trajectory is not None
        return self._trajectory

    # Checks

    def _check_names(self, found: Sequence[tuple[str, tuple[int, ...], Placement]]) -> None:
        unknown = sorted({name for name, _, _ in found} - set(self.base.entries))
        if unknown:
            raise ValueError(
                f"{len(unknown)} tensors of the engine are not in the base checkpoint {self.base.folder}, e.g. "
                f"{unknown[:3]}: RELEX writes checkpoints laid out like the base and would not know where they belong"
            )
        for name, shape, _ in found:
            if shape != self.base.entries[name].shape:
                there = self.base.entries[name].shape
                raise ValueError(f"{name} has shape {shape} in the engine, {there} in the base checkpoint")

    def _check_same_run(self, existing: Trajectory) -> None:
        index = existing.index
        ranks, encoding = collectives.world_size(), self.encoding_name
        expected = {"base model": self.base_model, "ranks": ranks, "encoding": encoding, **self.run}
        found = {"base model": index.base_model, "ranks": index.world_size, "encoding": index.encoding, **index.run}
        differing = {key: (found.get(key), value) for key, value in expected.items() if found.get(key) != value}
        if differing:
            said = "; ".join(f"{key} {there!r} there, {here!r} here" for key, (there, here) in differing.items())
            raise TrajectoryError(
                f"relex.output_dir={self.folder.parent} holds the trajectory of another run ({said}). "
                "Give this run its own relex.output_dir, or remove that folder"
            )


class _together:
    """A phase that ends on all ranks together: one rank's error is raised on each."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        collectives.all_or_nothing(error if isinstance(error, Exception) else None)


def _bits(weights: torch.Tensor) -> torch.Tensor:
    return weights.contiguous().view(torch.uint8)
