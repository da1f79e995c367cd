"""The append-only store of a run's increments on disk.

    trajectory/
      index.json                     schema, base model, kind, tensors, and the windows: origin and committed steps
      adapter/                       of LoRA only: the adapters before the first step, as PEFT writes them
      window_000/rank_00000/         a folder for each window, in it one for each rank:
        placements.json              which elements of which tensors this rank holds
        origin.safetensors           theta_0, only when it is not the base model
        step_000001.safetensors      one increment of every tensor, and this rank's part of the new row of H

A sketch has a file only for the steps at which it was stored: the moments of every tensor over all steps so far. The last
two are kept, so that a run killed between its checkpoint and ours can resume from the one before.

Every file is written to a temporary name and renamed. A step counts when the index names it, and the index is rewritten
after all ranks have written their files; what a killed run leaves beyond that is ignored, and overwritten by the next.
A trajectory is a list of windows, each with its own origin and folder (schema 1, of version 0.1.0: a single one, in the
trajectory's own folder). A `Trajectory` reads and writes one of them, the last unless another is asked for.
"""

import json
import os
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from relex_verl.trajectory.encodings import PackedStep, StoredStep
from relex_verl.trajectory.files import save_tensors, write_json
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint, resolve_model
from relex_verl.trajectory.index import (
    TrajectoryError,
    TrajectoryIndex,
    WindowRecord,
    read_index,
    step_ranges,
    write_index,
)
from relex_verl.trajectory.kinds import KINDS, Kind, RowCodec
from relex_verl.trajectory.shards import Placement

__all__ = ["ADAPTER_FOLDER", "Origin", "Trajectory", "TrajectoryError"]

# Files of a sketch that are kept.
KEPT_SKETCHES = 2
ADAPTER_FOLDER = "adapter"


class Trajectory:
    """A window of a trajectory folder, open for reading; `create`, `begin_window`, `append` and `commit` write it."""

    def __init__(self, folder: str | os.PathLike[str], window: int = -1) -> None:
        """Open an existing one.

        Args:
            folder: with index.json.
            window: which of its windows, from 0; -1 is the last, the one that is being observed.

        Raises:
            TrajectoryError: no index, one that this version cannot read, or no such window.
        """
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        windows = len(self.index.windows)
        if not -windows <= window < windows:
            raise TrajectoryError(f"{self.folder} has {windows} windows, numbered from 0: there is no window {window}")
        self._number = range(windows)[window]

    @classmethod
    def create(cls, folder: Path, index: TrajectoryIndex) -> "Trajectory":
        """Start one: write its index."""
        folder.mkdir(parents=True, exist_ok=True)
        write_index(folder, index)
        return cls(folder)

    def begin_window(self, origin_step: int) -> "Trajectory":
        """Begin another window, whose origin each rank stores (`declare_rank`).

        It counts once its own index is written (`write_index`); from then on nothing is written through this one.

        Args:
            origin_step: the training step of its theta_0, not before the last observed one.

        Raises:
            TrajectoryError: an earlier step.
        """
        last = max([self.index.windows[-1].origin_step, *self.index.windows[-1].steps])
        if origin_step < last:
            raise TrajectoryError(f"a window cannot begin at step {origin_step}: {self.folder} goes up to step {last}")
        other, number = copy(self), len(self.index.windows)
        other.index, other._number = deepcopy(self.index), number
        other.index.windows.append(WindowRecord(origin_step, "stored", folder=f"window_{number:03d}"))
        other.index.schema_version = 2
        return other

    def of_window(self, number: int) -> "Trajectory":
        """Another window of the same trajectory, from 0; they share the index."""
        other = copy(self)
        other._number = range(len(self.index.windows))[number]
        return other

    # What a rank writes

    def declare_rank(self, rank: int, placements: Mapping[str, Placement], origin: torch.Tensor | None) -> None:
        """Record which elements a rank holds and, when the base model is not theta_0, its part of theta_0, end to end."""
        folder = self._rank_folder(rank)
        folder.mkdir(parents=True, exist_ok=True)
        if origin is not None:
            save_tensors(folder / "origin.safetensors", {"origin": origin})
        runs = {
            name: {"start": placement.full_start, "length": placement.length} for name, placement in placements.items()
        }
        write_json(folder / "placements.json", runs)

    def append(self, rank: int, step: int, packed: PackedStep[Any]) -> None:
        """Write a rank's file of a step. It counts from `commit` on."""
        save_tensors(self._step_file(rank, step), packed.arrays)

    # What all ranks know, and one of them writes

    def commit(self, step: int) -> None:
        """A step that all ranks have appended counts."""
        self.record.steps.append(step)

    def commit_sketch(self, steps: Sequence[int]) -> list[int]:
        """A sketch of these steps that all ranks have appended counts; the steps of the files that are not kept for it."""
        stored = [*self.record.stored, steps[-1]]
        self.record.steps, self.record.stored = list(steps), stored[-KEPT_SKETCHES:]
        return stored[:-KEPT_SKETCHES]

    def forget(self, after: int) -> None:
        """The steps after this one do not count any more (a resumed run trains them again)."""
        self.record.steps = self.kept_after(after)
        self.record.stored = [step for step in self.record.stored if step <= after]

    def write_index(self) -> None:
        """Put on disk what counts."""
        write_index(self.folder, self.index)

    def delete(self, rank: int, steps: Sequence[int]) -> None:
        """Delete a rank's files of steps that do not count any more."""
        for step in steps:
            self._step_file(rank, step).unlink(missing_ok=True)

    # Reading

    @property
    def record(self) -> WindowRecord:
        """What the index says of this window."""
        return self.index.windows[self._number]

    @property
    def steps(self) -> list[int]:
        """The committed steps of this window."""
        return self.record.steps

    @property
    def names(self) -> list[str]:
        """Names of the observed tensors, in the order of the stacks."""
        return list(self.index.tensors)

    def base(self) -> BaseCheckpoint:
        """What theta_0 is read from and checkpoints are laid out like: the base model, found by the path or Hub id in the
        index; of LoRA the adapters before the first step."""
        adapters = self.index.adapters
        return BaseCheckpoint(self.folder / ADAPTER_FOLDER if adapters else resolve_model(self.index.base_model))

    @property
    def kind(self) -> Kind:
        """What is kept, and how."""
        return KINDS[self.index.encoding]

    def row_codec(self) -> RowCodec:
        """How its increments are kept.

        Raises:
            TrajectoryError: it is a sketch, and has none.
        """
        if self.kind.rows is None:
            raise TrajectoryError(
                f"{self.folder} is a sketch: it keeps polynomials over the steps, not the observed steps themselves. "
                "For this, observe with relex.trajectory=fp32 or bf16"
            )
        return self.kind.rows

    def placements(self, rank: int) -> dict[str, Placement]:
        """Which elements of which tensors a rank holds.

        Raises:
            TrajectoryError: the rank's folder is missing.
        """
        path = self._rank_folder(rank) / "placements.json"
        if not path.exists():
            raise TrajectoryError(f"{path} is missing: this trajectory was written by {self.index.world_size} ranks")
        content = json.loads(path.read_text())
        return {name: Placement(tuple(run["start"]), tuple(run["length"])) for name, run in content.items()}

    def load(self, rank: int, step: int) -> PackedStep[Any]:
        """A rank's file of a step, memory-mapped.

        Raises:
            TrajectoryError: missing or damaged.
        """
        path = self._step_file(rank, step)
        try:
            with safe_open(path, framework="pt") as handle:
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                return PackedStep(self.kind.part, arrays)
        except Exception as error:
            raise TrajectoryError(f"{path} cannot be read: {error}") from error

    def stored(self, rank: int, step: int) -> StoredStep[Any]:
        """A rank's file of a step, of which only the increments in use are in memory.

        Raises:
            TrajectoryError: missing or damaged.
        """
        path = self._step_file(rank, step)
        try:
            return StoredStep(self.kind.part, path)
        except Exception as error:
            raise TrajectoryError(f"{path} cannot be read: {error}") from error

    def readable_until(self, rank: int, step: int) -> int:
        """The last step up to `step` before which no file of a rank that the index names is damaged."""
        last = 0
        for named in self.steps if self.kind.keeps_rows else self.record.stored:
            if named > step:
                break
            try:
                self.load(rank, named)
            except TrajectoryError:
                if self.kind.keeps_rows:
                    return last
                continue  # an older or newer sketch is as whole
            last = named
        return step if self.kind.keeps_rows else last

    def kept_after(self, step: int) -> list[int]:
        """The steps that a run resumed after `step` goes on with: for a sketch, those of its last file up to there."""
        last = step
        if not self.kind.keeps_rows:
            last = max((stored for stored in self.record.stored if stored <= step), default=0)
        return [observed for observed in self.steps if observed <= last]

    def steps_until(self, cut: int | None) -> list[int]:
        """The committed steps up to a cut (all of them for None).

        Raises:
            TrajectoryError: there is none; a sketch was not stored at the last of them.
        """
        steps = [step for step in self.steps if cut is None or step <= cut]
        if not steps:
            raise TrajectoryError(f"{self.folder} holds no step up to {cut}; it holds {self.steps or 'none'}")
        if not self.kind.keeps_rows and steps[-1] not in self.record.stored:
            raise TrajectoryError(
                f"{self.folder} is a sketch, and can be cut only where it was stored: at {step_ranges(self.record.stored)}"
            )
        return steps

    def origin(self, rank: int, base: BaseCheckpoint, placements: Mapping[str, Placement]) -> "Origin":
        """A rank's part of theta_0."""
        stored = None if self.record.origin == "base" else self._rank_folder(rank) / "origin.safetensors"
        return Origin(base, placements, stored, self.kind.dtype)

    @property
    def elements(self) -> int:
        """Parameters of the observed tensors."""
        return sum(prod(shape) for shape in self.index.tensors.values())

    def _step_file(self, rank: int, step: int) -> Path:
        return self._rank_folder(rank) / f"step_{step:06d}.safetensors"

    def _rank_folder(self, rank: int) -> Path:
        return self.folder / self.record.folder / f"rank_{rank:05d}"


class Origin:
    """A rank's part of theta_0, read from disk tensor by tensor: origin[name] is (n,) in the kind's dtype."""

    def __init__(
        self, base: BaseCheckpoint, placements: Mapping[str, Placement], stored: Path | None, dtype: torch.dtype
    ) -> None:
        """Args: the base model, what the rank holds, and the file of its own copy where theta_0 is not the base."""
        self._base, self._placements, self._stored, self._dtype = base, placements, stored, dtype
        ends = accumulate(placement.numel for placement in placements.values())
        self._end = dict(zip(placements, ends, strict=True))

    def __getitem__(self, name: str) -> torch.Tensor:
        placement = self._placements[name]
        if self._stored is None:
            return self._base.read(name, placement).to(self._dtype)
        with safe_open(self._stored, framework="pt") as handle:
            return handle.get_slice("origin")[self._end[name] - placement.numel : self._end[name]]
