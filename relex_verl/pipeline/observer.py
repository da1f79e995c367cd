"""Recording: the weights of a running training become rows of a trajectory, on all ranks together.

`Observer` is one rank's part. What is predicted from it (`prediction`) has the same bits as later from the trajectory.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from relex_verl.maths.window import Window
from relex_verl.pipeline import resuming, windows
from relex_verl.pipeline.adapters import take_first_origin
from relex_verl.pipeline.collectives import Collectives
from relex_verl.pipeline.engine_shards import counted, exhausted
from relex_verl.pipeline.observation import Observation
from relex_verl.pipeline.recutting import recut
from relex_verl.trajectory.collectors import Held, collector_of
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint, resolve_model
from relex_verl.trajectory.index import TrajectoryIndex
from relex_verl.trajectory.kinds import Kind
from relex_verl.trajectory.origin import Origin
from relex_verl.trajectory.replay import ShardHistory
from relex_verl.trajectory.shards import ShardSource, TensorShard, check_cover, share_out
from relex_verl.trajectory.store import Trajectory
from relex_verl.trajectory.windows import WindowRecord

__all__ = ["Observer"]


class Observer:
    """Follows the weights of one rank of a training run. All ranks call the same methods in the same order.

    Methods raise on every rank when one fails (`PeerError` on the others), so that no rank is left waiting.
    """

    def __init__(
        self,
        folder: Path,
        base_model: str,
        aliases: Mapping[str, str],
        run: Mapping[str, Any],
        kind: Kind,
        ranks: Collectives | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: of the trajectory.
            base_model: folder or Hub id of the base model.
            aliases: tied name -> the name that it shares its elements with.
            run: what identifies the training run.
            kind: what is kept of the weights.
            ranks: of the training; those of the default process group for None.
            adapters: `adapter_config.json` where LoRA adapters of it are trained; None for its own weights.
        """
        self.kind, self.ranks, self.adapters = kind, ranks or Collectives(), adapters
        self.folder, self.base_model, self.aliases, self.run = folder, base_model, dict(aliases), dict(run)
        self.collector = collector_of(kind)
        self.shapes: dict[str, tuple[int, ...]] = {}  # of all tensors of all ranks, in the order of the stacks
        self.stored_L = torch.zeros(0, dtype=torch.float64)  # bytes on disk of each tensor
        # One block: kept among what comes and goes, pieces would hold on to the gaps between them.
        self._states = torch.zeros(0)
        self._base: BaseCheckpoint | None = None
        self._trajectory: Trajectory | None = None
        self.replays: WindowRecord | None = None  # a window that began at the very step from which the run was resumed

    # Start and resume

    def start(self, source: ShardSource, admit: Callable[[int, int], None] = lambda elements, tensors: None) -> None:
        """Take theta_0, before any checkpoint is loaded: who counts what, and whether it is the base model.

        Args:
            source: the engine's weights.
            admit: called on all ranks with the elements that this one will hold and the number of all tensors, before
                memory is taken for them; it may raise (on all ranks together) to refuse.

        Raises:
            ValueError: a tensor is not in the base checkpoint, or its elements are not covered exactly once.
        """
        with self.ranks.together():
            self._base = BaseCheckpoint(resolve_model(self.base_model)) if self.adapters is None else None
        with self.ranks.together():
            held_here = [(shard.name, shard.shape, shard.placement) for shard in source]
            if self._base is not None:
                resuming.check_names([(name, shape) for name, shape, _ in held_here], self._base)
        shared = share_out(self.ranks.gather(held_here))
        mine = shared[self.ranks.rank]
        with self.ranks.together():
            self.shapes = check_cover(shared)
            resuming.check_aliases(self.aliases, self.shapes)
        sizes = [placement.numel for _, placement in mine.values()]
        admit(sum(sizes), len(self.shapes))
        with self.ranks.together(), exhausted(source) as shards:
            self._states = torch.empty(sum(sizes), dtype=self.kind.dtype)
            states = self._states.split(sizes)
            own = {name: state.to(self.kind.of(name).dtype) for name, state in zip(mine, states, strict=True)}
            held = {name: Held(*where, own[name]) for name, where in mine.items()}
            self.collector.begin(held, len(self.shapes))
            dtypes = set()
            for _, shard_held, data in counted(shards, self.held, self.shapes):
                shard_held.state.copy_(data)
                dtypes |= {data.dtype} if data.device.type == "cpu" else set()
            for dtype in dtypes:
                self.collector.warm_up(dtype)
            self.stored_L = torch.zeros(len(self.shapes), dtype=torch.float64)

    def open(self, step: int) -> None:
        """Begin a trajectory on disk, or go on with the one of this run after `step` (0: from the start).

        Windows that began later do not count any more. One that began at this very step does, without its rows, and
        `replays` is its record: a host's checkpoint of the step was saved before its jump.

        Raises:
            TrajectoryError: the folder holds the trajectory of another run, or one of which a rank's files are gone.
        """
        tensors = {name: list(shape) for name, shape in self.shapes.items()}
        facts = self.kind.name, self.ranks.world_size, tensors, self.aliases, self.run
        adapters, encodings = self.adapters is not None, self.kind.encodings
        index = TrajectoryIndex(self.base_model, *facts, adapters=adapters, encodings=encodings)
        existing = resuming.find(self.ranks, self.folder, index, step)
        if existing is None:
            if self.adapters is not None and step:
                take_first_origin(self.ranks, self.folder, index.tensors, self.held, step)
            base = self.base if self.adapters is None else self.adapters
            self._trajectory = resuming.create(self.ranks, self.folder, index, self.held, self._states, base)
        else:
            self._trajectory = existing = recut(self.ranks, existing, self.held)
            windows.go_on(self.ranks, existing, self.collector)
            self.replays = existing.record if existing.number and existing.record.origin_step == step else None
            self._count_bytes()
        self._base = self._base or self.trajectory.base()

    def begin_window(
        self, step: int, source: ShardSource, jump: Mapping[str, Any] | None = None, undone: bool = False
    ) -> None:
        """Begin another window, whose theta_0 are the engine's weights as they are now; all that follows is of it alone.

        It counts from the moment its index is written. Where that fails, this observer takes nothing more.

        Args:
            step: the training step just done.
            source: the engine's weights.
            jump, undone: how they came to be, see `WindowRecord`.

        Raises:
            TrajectoryError: a step before the last observed one; a jump that does not say what it has to.
            ValueError: weights that are not finite; shards that differ from the first time.
        """
        self.save()
        following = windows.following(self.ranks, self.trajectory, step, jump, undone)
        self._trajectory = None  # its states are overwritten from here on
        windows.begin(self.ranks, following, source, self.collector, self._states)
        self._trajectory, self.replays = following, None
        self.stored_L = torch.zeros(len(self.shapes), dtype=torch.float64)

    # Observe

    @property
    def steps(self) -> list[int]:
        """The observed steps."""
        return self.collector.steps

    @property
    def held(self) -> dict[str, Held]:
        """The shards that this rank counts, in the order in which the engine hands them out."""
        return self.collector.held

    def observe(
        self, step: int, source: ShardSource, accept: Callable[[torch.Tensor], None] = lambda figures_Lk: None
    ) -> Observation:
        """Add one row: the change of every tensor since the row before.

        Nothing is kept of it if a rank fails; a sketch, which cannot take it back, accepts no other after that.

        Args:
            step: its training step.
            source: the engine's weights.
            accept: called with what `Collector.keep` gets before the step counts; it may raise (on all ranks together).

        Raises:
            ValueError: weights that are not finite; shards that differ from the first time.
        """
        trajectory = self.trajectory
        with self.ranks.together(), exhausted(source) as shards:
            figures_lk, changed_l, file = self.collector.take(step, counted(shards, self.held, self.shapes))
            if file is not None:
                trajectory.append(self.ranks.rank, step, file)
        mine_lk = torch.zeros(len(self.held), figures_lk.shape[1] + 2, dtype=torch.float64)
        mine_lk[:, :-2], mine_lk[:, -2] = figures_lk, changed_l
        if file is not None:
            mine_lk[:, -1] = file.bytes_of_tensors()
        total_Lk = torch.zeros(len(self.shapes), mine_lk.shape[1], dtype=torch.float64)
        total_Lk[self._rows_held()] = mine_lk
        total_Lk = self.ranks.sum_over_ranks(total_Lk)
        accept(total_Lk[:, :-2])
        if file is not None:
            trajectory.commit(step)
            self._write_index()
        # From here on nothing can fail on one rank alone.
        self.collector.keep(step, total_Lk[:, :-2])
        elements_L = torch.tensor([prod(shape) for shape in self.shapes.values()], dtype=torch.float64)
        self.stored_L = self.stored_L + total_Lk[:, -1]
        changed_L = total_Lk[:, -2]
        share = float(changed_L.sum() / elements_L.sum())
        return Observation(step, share, int(self.stored_L.sum()), changed_L / elements_L, self.stored_L)

    def save(self) -> None:
        """Put on disk what only memory holds, for a run that resumes after this step: a sketch. Rows are there already."""
        if self.trajectory.record.stored[-1:] == self.steps[-1:]:
            return  # at the cut, and again before verl's checkpoint of that step; rows have none to store
        with self.ranks.together():
            whole = self.collector.snapshot()
            if whole is not None:
                self.trajectory.append(self.ranks.rank, self.steps[-1], whole)
        if whole is not None:
            dropped = self.trajectory.commit_sketch(self.steps)
            self._write_index()
            self.trajectory.delete(self.ranks.rank, dropped)
            self._count_bytes()

    def _count_bytes(self) -> None:
        stored_L = torch.zeros(len(self.shapes), dtype=torch.float64)
        stored_L[self._rows_held()] = self.collector.bytes_of_tensors()
        self.stored_L = self.ranks.sum_over_ranks(stored_L)

    def _write_index(self) -> None:
        with self.ranks.together():
            if self.ranks.rank == 0:
                self.trajectory.write_index()

    def _rows_held(self) -> list[int]:
        """Positions in the stacks of the tensors that this rank holds."""
        position = {name: i for i, name in enumerate(self.shapes)}
        return [position[name] for name in self.held]

    # What is recorded

    def window(self, of: slice = slice(None)) -> Window:
        """All rows so far, the same on every rank; of some tensors only, where others are not wanted."""
        return self.collector.window(list(self.shapes), self.trajectory.record.origin_step, of)

    def histories(self) -> Iterator[ShardHistory]:
        """This rank's shards with all that is kept of them, in the order of the stacks."""
        index = {name: i for i, name in enumerate(self.held)}
        origin = self._origin()
        for name in self.shapes:
            if name in self.held:
                held, codec = self.held[name], self.kind.of(name).rows
                anchor = held.state if codec is not None and codec.anchor_is_last else origin[name]
                parts, dtype = self.collector.parts(index[name]), self.base.dtype(name)
                yield ShardHistory(name, held.shape, held.placement, anchor, parts, dtype)

    def origin_shards(self) -> Iterator[TensorShard]:
        """This rank's shards of the window's theta_0, in the kind's dtype, in the order of the stacks; read from disk."""
        origin = self._origin()
        for name in self.shapes:
            if name in self.held:
                yield TensorShard(name, self.held[name].shape, self.held[name].placement, origin[name])

    def _origin(self) -> Origin:
        placements = {name: held.placement for name, held in self.held.items()}
        return self.trajectory.origin(self.ranks.rank, self.base, placements)

    def current(self, source: ShardSource) -> Iterator[TensorShard]:
        """This rank's shards as the engine holds them now, rounded to the base's types, in the order of the stacks.

        On the host: the rollout's weights are on the device already.
        """
        mine = {}
        with self.ranks.together(), exhausted(source) as shards:
            for shard in shards:
                if shard.name in self.held:
                    data = shard.data.detach().to("cpu", self.base.dtype(shard.name), copy=True)
                    mine[shard.name] = TensorShard(shard.name, shard.shape, shard.placement, data)
        return (mine[name] for name in self.shapes if name in mine)

    def reopen_base(self) -> None:
        """Let go of the pages of the base that have been read."""
        self._base = BaseCheckpoint(self.base.folder)

    @property
    def base(self) -> BaseCheckpoint:
        """What checkpoints are laid out like, see `Trajectory.base`; `start` comes first, of adapters `open`."""
        assert self._base is not None
        return self._base

    @property
    def trajectory(self) -> Trajectory:
        """The store on disk; `open` comes first.

        Raises:
            RuntimeError: a window could not be begun.
        """
        if self._trajectory is None:
            raise RuntimeError("no trajectory is open: resume from the one on disk")
        return self._trajectory
