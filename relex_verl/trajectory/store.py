"""The append-only store of a run's increments on disk.

    trajectory/
      index.json                     schema, base model, kind, tensors, and the windows: origin and committed steps
      adapter/                       of LoRA only: the adapters before the first step, as PEFT writes them
      files/                         of a finished run: its configuration and tokenizer, where they differ from the base's
      window_000/rank_00000/         a folder for each window, in it one for each rank:
        placements.json              which elements of which tensors this rank holds
        origin.safetensors           theta_0, only when it is not the base model
        step_000001.safetensors      one increment of every tensor, and this rank's part of the new row of H

A sketch has a file only for the steps at which it was stored: the moments of every tensor over all steps so far. The last
two are kept, so that a run killed between its checkpoint and ours can resume from the one before.

Every file is written to a temporary name and renamed. A step counts when the index names it, and the index is rewritten
after all ranks have written their files; what a killed run leaves beyond that is ignored, and overwritten by the next.
A trajectory is a list of windows, each with its own origin and folder (schema 1, of version 0.1.0: a single one, in the
trajectory's own folder). A window, too, counts when the index names it, after all ranks have written their origins. A
`Trajectory` reads and writes one of them, the last unless another is asked for.
"""

import json
import os
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from relex_verl.trajectory.base import opened_base
from relex_verl.trajectory.encodings import MixedStep, PackedStep, StoredStep, read_step, stored_step
from relex_verl.trajectory.files import save_tensors, write_json
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.index import (
    TrajectoryError,
    TrajectoryIndex,
    WindowRecord,
    read_index,
    step_ranges,
    write_index,
)
from relex_verl.trajectory.kinds import KINDS, Kind, RowCodec
from relex_verl.trajectory.origin import Origin
from relex_verl.trajectory.shards import Placement
from relex_verl.trajectory.windows import check_windows, next_folder

__all__ = ["ADAPTER_FOLDER", "FILES_FOLDER", "Trajectory", "TrajectoryError"]

# Files of a sketch that are kept.
KEPT_SKETCHES = 2
ADAPTER_FOLDER, FILES_FOLDER = "adapter", "files"


class Trajectory:
    """A window of a trajectory folder, open for reading; `create`, `begin_window`, `append` and `commit` write it.

    Attributes:
        folder: of the trajectory.
        index: what its index.json says, of all windows.
        number: of this window, from 0.
    """

    def __init__(
        self, folder: str | os.PathLike[str], window: int = -1, base: str | os.PathLike[str] | None = None
    ) -> None:
        """Open an existing one.

        Args:
            folder: with index.json.
            window: which of its windows, from 0; -1 is the last, the one that is being observed.
            base: folder or Hub id of the base model now, where it is not that in the index any more.

        Raises:
            TrajectoryError: no index, one that this version cannot read, or no such window.
        """
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if base is not None:
            self.index.base_model = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
        self.number = self._place(window)

    @classmethod
    def create(cls, folder: Path, index: TrajectoryIndex) -> "Trajectory":
        """Start one: write its index."""
        folder.mkdir(parents=True, exist_ok=True)
        write_index(folder, index)
        return cls(folder)

    def begin_window(
        self, origin_step: int, jump: Mapping[str, Any] | None = None, undone: bool = False
    ) -> "Trajectory":
        """Begin another window, whose origin each rank stores (`declare_rank`).

        It counts once its own index is written (`write_index`); from then on nothing is written through this one.

        Args:
            origin_step: the training step of its theta_0, not before the last observed one.
            jump, undone: how its theta_0 came to be, see `WindowRecord`.

        Raises:
            TrajectoryError: an earlier step; a jump that says something else than it has to.
        """
        other = copy(self)
        other.index, other.number = deepcopy(self.index), len(self.index.windows)
        begun_by, folder = None if jump is None else dict(jump), next_folder([one.folder for one in self.windows])
        record = WindowRecord(origin_step, "stored", folder=folder, jump=begun_by, undone=undone)
        other.index.windows.append(record)
        other.index.schema_version = max(2, self.index.schema_version)
        try:
            check_windows(other.index.windows)
        except ValueError as error:
            raise TrajectoryError(f"{self.folder}: {error}") from error
        return other

    def of_window(self, number: int) -> "Trajectory":
        """Another window of the same trajectory, numbered as in `Trajectory`; they share the index.

        Raises:
            TrajectoryError: there is no such window.
        """
        other = copy(self)
        other.number = self._place(number)
        return other

    # What a rank writes

    def declare_rank(self, rank: int, placements: Mapping[str, Placement], origin: torch.Tensor | None) -> None:
        """Record which elements a rank holds and, when the base model is not theta_0, its part of theta_0, end to end."""
        folder = self.rank_folder(rank)
        folder.mkdir(parents=True, exist_ok=True)
        if origin is not None:
            save_tensors(folder / "origin.safetensors", {"origin": origin})
        runs = {
            name: {"start": placement.full_start, "length": placement.length} for name, placement in placements.items()
        }
        write_json(folder / "placements.json", runs)

    def append(self, rank: int, step: int, packed: PackedStep[Any] | MixedStep) -> None:
        """Write a rank's file of a step. It counts from `commit` on."""
        save_tensors(self.step_file(rank, step), packed.arrays)

    # What all ranks know, and one of them writes

    def commit(self, step: int) -> None:
        """A step that all ranks have appended counts."""
        self.record.steps.append(step)

    def commit_sketch(self, steps: Sequence[int]) -> list[int]:
        """A sketch of these steps that all ranks have appended counts; the steps of the files that are not kept for it."""
        stored = [*self.record.stored, steps[-1]]
        self.record.steps, self.record.stored = list(steps), stored[-KEPT_SKETCHES:]
        return stored[:-KEPT_SKETCHES]

    def write_index(self) -> None:
        """Put on disk what counts."""
        write_index(self.folder, self.index)

    def delete(self, rank: int, steps: Sequence[int]) -> None:
        """Delete a rank's files of steps that do not count any more."""
        for step in steps:
            self.step_file(rank, step).unlink(missing_ok=True)

    # Reading

    @property
    def record(self) -> WindowRecord:
        """What the index says of this window."""
        return self.index.windows[self.number]

    @property
    def steps(self) -> list[int]:
        """The committed steps of this window."""
        return self.record.steps

    @property
    def windows(self) -> list[WindowRecord]:
        """What the index says of every window, in their order."""
        return self.index.windows

    @property
    def names(self) -> list[str]:
        """Names of the observed tensors, in the order of the stacks."""
        return list(self.index.tensors)

    def base(self) -> BaseCheckpoint:
        """What checkpoints are laid out like: the base model, of LoRA the adapters before the first step."""
        return BaseCheckpoint(self.folder / ADAPTER_FOLDER) if self.index.adapters else self.base_model()

    def base_model(self) -> BaseCheckpoint:
        """The base model, of whatever kind of trajectory; TrajectoryError where it is not there or has changed."""
        return opened_base(self.folder, self.index)

    @property
    def files(self) -> Path:
        """Folder of files that take the place of the base's in what is written; there only where some differ."""
        return self.folder / FILES_FOLDER

    @property
    def kind(self) -> Kind:
        """What is kept, and how."""
        return KINDS[self.index.encoding].beside(self.index.encodings)

    def row_codec(self, tensor: str = "") -> RowCodec:
        """How its increments are kept, of a tensor that has a kind of its own those.

        Raises:
            TrajectoryError: it is a sketch, and has none.
        """
        if (rows := self.kind.of(tensor).rows) is None:
            raise TrajectoryError(
                f"{self.folder} is a sketch: it keeps polynomials over the steps, not the observed steps themselves. "
                "For this, observe with relex.trajectory=fp32 or bf16"
            )
        return rows

    def placements(self, rank: int) -> dict[str, Placement]:
        """Which elements of which tensors a rank holds.

        Raises:
            TrajectoryError: the rank's folder is missing, or damaged.
        """
        path = self.rank_folder(rank) / "placements.json"
        if not path.exists():
            raise TrajectoryError(f"{path} is missing: this trajectory was written by {self.index.world_size} ranks")
        try:
            content = json.loads(path.read_text())
            return {name: Placement(tuple(run["start"]), tuple(run["length"])) for name, run in content.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrajectoryError(f"{path} is damaged: {error}") from error

    def load(self, rank: int, step: int) -> PackedStep[Any] | MixedStep:
        """A rank's file of a step, memory-mapped.

        Raises:
            TrajectoryError: missing or damaged.
        """
        path = self.step_file(rank, step)
        try:
            with safe_open(path, framework="pt") as handle:
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                return read_step(self.kind.ways, arrays)
        except Exception as error:
            raise TrajectoryError(f"{path} cannot be read: {error}") from error

    def stored(self, rank: int, step: int) -> StoredStep[Any] | MixedStep:
        """A rank's file of a step, of which only the increments in use are in memory.

        Raises:
            TrajectoryError: missing or damaged.
        """
        path = self.step_file(rank, step)
        try:
            return stored_step(self.kind.ways, path)
        except Exception as error:
            raise TrajectoryError(f"{path} cannot be read: {error}") from error

    def steps_until(self, cut: int | None) -> list[int]:
        """The committed steps up to a cut (all of them for None).

        Raises:
            TrajectoryError: there is none; a sketch was not stored at the last of them.
        """
        steps = [step for step in self.steps if cut is None or step <= cut]
        if not steps:
            limit = "" if cut is None else f" up to {cut}"
            begun = f" in window {self.number}, which begins at {self.record.origin_step}"
            where = begun if len(self.windows) > 1 else ""
            raise TrajectoryError(f"{self.folder} holds no step{limit}{where}; it holds {self.steps or 'none'}")
        if not self.kind.keeps_rows and steps[-1] not in self.record.stored:
            raise TrajectoryError(
                f"{self.folder} is a sketch, and can be cut only where it was stored: at {step_ranges(self.record.stored)}"
            )
        return steps

    def origin(self, rank: int, base: BaseCheckpoint, placements: Mapping[str, Placement]) -> Origin:
        """A rank's part of theta_0."""
        stored = None if self.record.origin == "base" else self.rank_folder(rank) / "origin.safetensors"
        return Origin(base, placements, stored, self.kind)

    @property
    def elements(self) -> int:
        """Parameters of the observed tensors."""
        return sum(prod(shape) for shape in self.index.tensors.values())

    def _place(self, window: int) -> int:
        windows = len(self.index.windows)
        if not -windows <= window < windows:
            raise TrajectoryError(f"{self.folder} has {windows} windows, numbered from 0: there is no window {window}")
        return range(windows)[window]

    def step_file(self, rank: int, step: int) -> Path:
        """Of a rank."""
        return self.rank_folder(rank) / f"step_{step:06d}.safetensors"

    def rank_folder(self, rank: int) -> Path:
        """What a rank has written."""
        return self.folder / self.record.folder / f"rank_{rank:05d}"
