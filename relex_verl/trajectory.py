"""The append-only store of a run's increments on disk.

    trajectory/
      index.json                     schema, base model, tensors, and the windows: origin and committed steps
      rank_00000/placements.json     which elements of which tensors this rank holds
      rank_00000/origin.safetensors  theta_0, only when it is not the base model
      rank_00000/step_000001.safetensors   one increment of every tensor, and this rank's part of the new row of H

Every file is written to a temporary name and renamed. A step counts when the index names it, and the index is rewritten
after all ranks have written their files; what a killed run leaves beyond that is ignored, and overwritten by the next.
A trajectory is a list of windows, each with its own origin; what reads or writes one here works on the last.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from relex_verl.encodings import ENCODINGS, Encoding, PackedStep, StoredStep
from relex_verl.gram import append_row
from relex_verl.hf_checkpoint import BaseCheckpoint, resolve_model, write_json
from relex_verl.shards import Placement, TensorShard

__all__ = [
    "SCHEMA_VERSION",
    "ShardHistory",
    "Trajectory",
    "TrajectoryError",
    "TrajectoryIndex",
    "Window",
    "step_ranges",
]

SCHEMA_VERSION = 1


class TrajectoryError(RuntimeError):
    """A trajectory that is missing, damaged, or of another run."""


@dataclass
class Window:
    """A stretch of observation from one origin theta_0.

    Attributes:
        origin_step: the training step of theta_0.
        origin: "base" when theta_0 is the base model (in the encoding's dtype), "stored" when each rank holds its own copy.
        steps: the committed steps, ascending.
    """

    origin_step: int = 0
    origin: str = "base"
    steps: list[int] = field(default_factory=list)


@dataclass
class TrajectoryIndex:
    """What index.json says.

    Attributes:
        base_model: folder or Hub id of the base.
        encoding: how increments are kept.
        world_size: number of rank folders.
        tensors: name -> shape, in the order of the stacks (L, ...).
        aliases: tied name -> the name in `tensors` that holds its elements.
        run: what identifies the training run.
        windows: at least one.
    """

    base_model: str
    encoding: str
    world_size: int
    tensors: dict[str, list[int]]
    aliases: dict[str, str]
    run: dict[str, Any]
    windows: list[Window] = field(default_factory=lambda: [Window()])
    schema_version: int = SCHEMA_VERSION


class ShardHistory(NamedTuple):
    """All that is known of one shard up to some step."""

    name: str
    shape: tuple[int, ...]
    placement: Placement
    last: torch.Tensor  # (n,) at the last of the steps, in the encoding's dtype
    increments: list[Any]


class Trajectory:
    """A trajectory folder, open for reading; `create`, `append` and `commit` write it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open an existing one.

        Raises:
            TrajectoryError: no index, or one that this version cannot read.
        """
        self.folder = Path(folder)
        try:
            content = json.loads((self.folder / "index.json").read_text())
        except FileNotFoundError:
            raise TrajectoryError(f"{self.folder} holds no trajectory (no index.json)") from None
        except json.JSONDecodeError as error:
            raise TrajectoryError(f"{self.folder}/index.json is damaged: {error}") from error
        if content.get("schema_version") != SCHEMA_VERSION:
            raise TrajectoryError(
                f"{self.folder} has schema version {content.get('schema_version')}, this relex-verl reads {SCHEMA_VERSION}"
            )
        windows = [Window(**window) for window in content.pop("windows")]
        self.index = TrajectoryIndex(**content, windows=windows)

    @classmethod
    def create(cls, folder: Path, index: TrajectoryIndex) -> "Trajectory":
        """Start one: write its index."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "index.json", asdict(index))
        return cls(folder)

    # What a rank writes

    def declare_rank(self, rank: int, placements: Mapping[str, Placement], origin: list[torch.Tensor] | None) -> None:
        """Record which elements a rank holds and, when the base model is not theta_0, its part of theta_0."""
        folder = self._rank_folder(rank)
        folder.mkdir(parents=True, exist_ok=True)
        if origin is not None:
            _save(folder / "origin.safetensors", {"origin": torch.cat(origin)})
        runs = {name: {"start": one.full_start, "length": one.length} for name, one in placements.items()}
        write_json(folder / "placements.json", runs)

    def append(self, rank: int, step: int, packed: PackedStep[Any]) -> None:
        """Write a rank's file of a step. It counts from `commit` on."""
        _save(self._step_file(rank, step), packed.arrays)

    # What rank 0 writes

    def commit(self, step: int) -> None:
        """Name a step in the index, after all ranks have appended it."""
        self.window.steps.append(step)
        write_json(self.folder / "index.json", asdict(self.index))

    def truncate(self, after: int) -> None:
        """Forget the steps after this one (a resumed run trains them again)."""
        self.window.steps = [step for step in self.steps if step <= after]
        write_json(self.folder / "index.json", asdict(self.index))

    # Reading

    @property
    def window(self) -> Window:
        """The window that is being observed: the last."""
        return self.index.windows[-1]

    @property
    def steps(self) -> list[int]:
        """The committed steps of the last window."""
        return self.window.steps

    @property
    def names(self) -> list[str]:
        """Names of the observed tensors, in the order of the stacks."""
        return list(self.index.tensors)

    def base(self) -> BaseCheckpoint:
        """The base model, found by the path or Hub id in the index."""
        return BaseCheckpoint(resolve_model(self.index.base_model))

    @property
    def encoding(self) -> Encoding:
        """How its increments are kept."""
        return ENCODINGS[self.index.encoding]

    def placements(self, rank: int) -> dict[str, Placement]:
        """Which elements of which tensors a rank holds.

        Raises:
            TrajectoryError: the rank's folder is missing.
        """
        path = self._rank_folder(rank) / "placements.json"
        if not path.exists():
            raise TrajectoryError(f"{path} is missing: this trajectory was written by {self.index.world_size} ranks")
        content = json.loads(path.read_text())
        return {name: Placement(tuple(one["start"]), tuple(one["length"])) for name, one in content.items()}

    def load(self, rank: int, step: int) -> PackedStep[Any]:
        """A rank's file of a step, memory-mapped.

        Raises:
            TrajectoryError: missing or damaged.
        """
        path = self._step_file(rank, step)
        try:
            with safe_open(path, framework="pt") as handle:
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                return PackedStep(self.encoding.increment, arrays)
        except Exception as error:
            raise TrajectoryError(f"{path} cannot be read: {error}") from error

    def stored(self, rank: int, step: int) -> StoredStep[Any]:
        """A rank's file of a step, of which only the increments in use are in memory.

        Raises:
            TrajectoryError: missing or damaged.
        """
        path = self._step_file(rank, step)
        try:
            return StoredStep(self.encoding.increment, path)
        except Exception as error:
            raise TrajectoryError(f"{path} cannot be read: {error}") from error

    def steps_until(self, cut: int | None) -> list[int]:
        """The committed steps up to a cut (all of them for None).

        Raises:
            TrajectoryError: there is none.
        """
        steps = [step for step in self.steps if cut is None or step <= cut]
        if not steps:
            raise TrajectoryError(f"{self.folder} holds no step up to {cut}; it holds {self.steps or 'none'}")
        return steps

    def increment_gram(self, cut: int | None = None) -> torch.Tensor:
        """H of the steps up to the cut, (L, T, T), summed over the ranks."""
        steps = self.steps_until(cut)
        position = {name: i for i, name in enumerate(self.names)}
        rows = [torch.zeros(len(position), t + 1, dtype=torch.float64) for t in range(len(steps))]
        for rank in range(self.index.world_size):
            placements = self.placements(rank)
            where = torch.tensor([position[name] for name in placements], dtype=torch.int64)
            for row, step in zip(rows, steps, strict=True):
                row[where] += self.load(rank, step).arrays["gram_row"]
        gram_LTT = torch.zeros(len(position), 0, 0, dtype=torch.float64)
        for row in rows:
            gram_LTT = append_row(gram_LTT, row)
        return gram_LTT

    def origin(self, rank: int, base: BaseCheckpoint, placements: Mapping[str, Placement]) -> Iterator[torch.Tensor]:
        """A rank's part of theta_0, tensor by tensor, (n,) in the encoding's dtype."""
        if self.window.origin == "base":
            yield from (base.read(name, placement).to(self.encoding.dtype) for name, placement in placements.items())
            return
        with safe_open(self._rank_folder(rank) / "origin.safetensors", framework="pt") as handle:
            flat = handle.get_tensor("origin")
        yield from flat.split([placement.numel for placement in placements.values()])

    def histories(self, cut: int | None = None, ranks: Sequence[int] | None = None) -> Iterator[ShardHistory]:
        """Every shard with its increments up to the cut and its weights at the last of them, one at a time."""
        steps, base = self.steps_until(cut), self.base()
        for rank in range(self.index.world_size) if ranks is None else ranks:
            placements = self.placements(rank)
            packed = [self.stored(rank, step) for step in steps]
            origins = self.origin(rank, base, placements)
            for i, ((name, placement), origin) in enumerate(zip(placements.items(), origins, strict=True)):
                increments = [one.increment(i) for one in packed]
                state = origin.clone()  # it may be a view of a memory-mapped file
                for increment in increments:
                    self.encoding.advance(state, increment)
                yield ShardHistory(name, tuple(self.index.tensors[name]), placement, state, increments)

    @property
    def elements(self) -> int:
        """Parameters of the observed tensors."""
        return sum(prod(shape) for shape in self.index.tensors.values())

    def error_bound(self, step: int) -> float:
        """How far a weight of `states(step)` can be from the engine's own: 0 for bf16, half a quantum for fp32."""
        if step == self.window.origin_step:
            return 0.0
        self._check_observed(step)
        increments = (
            self.load(rank, step).increment(i)
            for rank in range(self.index.world_size)
            for i in range(len(self.placements(rank)))
        )
        return max((self.encoding.error_bound(increment) for increment in increments), default=0.0)

    def states(self, step: int) -> Iterator[TensorShard]:
        """Every shard as it was at an observed step or at the origin: bit for bit for bf16, the reconstruction for fp32.


        Raises:
            TrajectoryError: the step was not observed.
        """
        if step == self.window.origin_step:
            yield from self._origins()
            return
        self._check_observed(step)
        for history in self.histories(step):
            yield TensorShard(history.name, history.shape, history.placement, history.last)

    def _check_observed(self, step: int) -> None:
        if step not in self.steps:
            raise TrajectoryError(f"step {step} was not observed; {self.folder} holds {step_ranges(self.steps)}")

    def _origins(self) -> Iterator[TensorShard]:
        base = self.base()
        for rank in range(self.index.world_size):
            placements = self.placements(rank)
            for (name, placement), data in zip(placements.items(), self.origin(rank, base, placements), strict=True):
                yield TensorShard(name, tuple(self.index.tensors[name]), placement, data)

    def _step_file(self, rank: int, step: int) -> Path:
        return self._rank_folder(rank) / f"step_{step:06d}.safetensors"

    def _rank_folder(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}"


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk keeps no half of a file
        raise
    os.replace(temporary, path)


def step_ranges(steps: Sequence[int]) -> str:
    """Step numbers for people: 1-5, 8, 10-12."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return ", ".join("-".join(map(str, part)) for part in parts) or "none"
