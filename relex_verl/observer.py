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
from relex_verl.encodings import ENCODINGS, Encoding, PackedStep
from relex_verl.gram import append_row, delta_gram
from relex_verl.hf_checkpoint import BaseCheckpoint, CheckpointWriter, resolve_model
from relex_verl.prediction import Prediction, predicted_tensors
from relex_verl.shards import Placement, ShardSource, TensorShard, check_cover, share_out
from relex_verl.trajectory import ShardHistory, Trajectory, TrajectoryError, TrajectoryIndex, Window

__all__ = ["Observation", "Observer"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observation:
    """One observed step, summed over the ranks.

    Attributes:
        step: the training step.
        changed_share: share of the weights whose change since the row before was not 0 (as the encoding keeps it).
        stored_bytes: bytes that the trajectory holds on disk.
    """

    step: int
    changed_share: float
    stored_bytes: int


@dataclass
class _Held:
    """A shard that this rank is the one to count."""

    shape: tuple[int, ...]
    placement: Placement
    last: torch.Tensor  # (n,) on the host, the weights at the last observed row in the encoding's dtype


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
        self.held: dict[str, _Held] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of all tensors of all ranks, in the order of the stacks
        self.packed: list[PackedStep[Any]] = []
        self.steps: list[int] = []
        self.increment_gram_LTT = torch.zeros(0, 0, 0, dtype=torch.float64)
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
                    last = shard.data.detach().to("cpu", self.encoding.dtype, copy=True)
                    self.held[shard.name] = _Held(shard.shape, shard.placement, last)
            self.increment_gram_LTT = torch.zeros(len(self.shapes), 0, 0, dtype=torch.float64)

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
        if existing is not None and any(observed <= step for observed in existing.steps):
            self._resume(existing, step)
        else:
            self._create()

    def _create(self) -> None:
        is_base = False
        with _together():
            is_base = all(
                torch.equal(_bits(self.base.read(name, held.placement).to(self.encoding.dtype)), _bits(held.last))
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
            parts = None if everywhere_base else [held.last for held in self.held.values()]
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
            existing.window.steps = existing.steps_until(step)
            for history in existing.histories(step, ranks=[rank]):
                self.held[history.name].last = history.last
            self.steps = list(existing.steps)
            self.packed = [existing.load(rank, observed) for observed in self.steps]
            self.increment_gram_LTT = existing.increment_gram()
        with _together():
            if rank == 0:
                existing.truncate(step)
        self.stored_bytes = sum(collectives.gather(sum(packed.nbytes for packed in self.packed)))
        self._trajectory = existing

    # Observe

    def observe(self, step: int, source: ShardSource) -> Observation:
        """Add one row: the change of every tensor since the row before. Nothing is kept of it if a rank fails.

        Raises:
            ValueError: weights that are not finite; shards that differ from the first time.
        """
        increments: list[Any] = []
        row_LT = torch.zeros(len(self.shapes), len(self.packed) + 1, dtype=torch.float64)
        with _together():
            increments = self._encode(source, row_LT)
            packed = PackedStep.pack(self.encoding.increment, increments, row_LT[self._rows_held()])
            self.trajectory.append(collectives.rank(), step, packed)
        elements = sum(held.placement.numel for held in self.held.values())
        changed = sum(increment.changed for increment in increments)
        counts = torch.tensor([changed, elements, packed.nbytes], dtype=torch.float64)
        total = collectives.sum_over_ranks(torch.cat([row_LT.flatten(), counts]))
        with _together():
            if collectives.rank() == 0:
                self.trajectory.commit(step)
            else:
                self.trajectory.steps.append(step)
        # From here on nothing can fail on one rank alone.
        self.increment_gram_LTT = append_row(self.increment_gram_LTT, total[:-3].view_as(row_LT))
        self.packed.append(packed)
        self.steps.append(step)
        for i, held in enumerate(self.held.values()):
            self.encoding.advance(held.last, packed.increment(i))
        changed, elements, nbytes = total[-3:].tolist()
        self.stored_bytes += int(nbytes)
        return Observation(step, changed / elements, self.stored_bytes)

    def _encode(self, source: ShardSource, row_LT: torch.Tensor) -> list[Any]:
        """This rank's increments; its part of the new row of H, (L, t + 1), goes into `row_LT`."""
        increments: list[Any] = []
        names, positions = list(self.held), self._rows_held()
        for shard in source:
            if shard.name not in self.held:
                continue
            i, held = len(increments), self.held[shard.name]
            if shard.name != names[i] or shard.placement != held.placement:
                raise ValueError(f"{shard.name}: the engine cuts or orders its weights otherwise than at the start")
            increment = self.encoding.encode(held.last, shard.data.detach())
            history = [packed.increment(i) for packed in self.packed]
            row_LT[positions[i]] = self.encoding.dots([*history, increment], len(held.last), shard.data.device)
            increments.append(increment)
        if len(increments) != len(names):
            raise ValueError(
                f"the engine handed out {len(increments)} of the {len(names)} shards that it had at the start"
            )
        return increments

    def _rows_held(self) -> list[int]:
        """Positions in the stacks of the tensors that this rank holds."""
        position = {name: i for i, name in enumerate(self.shapes)}
        return [position[name] for name in self.held]

    # Predict

    def gram(self) -> torch.Tensor:
        """G of all rows so far, (L, T, T), the same on every rank."""
        return delta_gram(self.increment_gram_LTT)

    def histories(self) -> Iterator[ShardHistory]:
        """This rank's shards with all their increments, in the order of the stacks."""
        index = {name: i for i, name in enumerate(self.held)}
        for name in self.shapes:
            if name not in self.held:
                continue
            i, held = index[name], self.held[name]
            increments = [packed.increment(i) for packed in self.packed]
            yield ShardHistory(name, held.shape, held.placement, held.last, increments)

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
